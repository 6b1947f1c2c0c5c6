"""Tests of the embedded data set: the same bytes every time, exact boxes, and a folder that mends itself."""

from __future__ import annotations

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
import yaml

from paceline.data.scenes import scene as scene_module
from paceline.data.scenes.draws import Draws
from paceline.data.scenes.outline import CLASS_NAMES, OUTLINES, area_of, box_of
from paceline.data.scenes.pattern import PATTERNS, clouds, contours, turned
from paceline.data.scenes.scene import SceneConfig, draw_scene
from paceline.data.shapes import MARKER, ShapesConfig, ensure
from paceline.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ShapesConfig(train=6, val=3)
PLAIN = SceneConfig(
    shapes=(1, 1), pattern_contrast=0.0, threads=0, noise=0.0, blur=0.0, exposure=(1.0, 1.0), fall_off=0.0, vignette=0.0
)


def digest(folder: Path) -> str:
    """Hash the names and the bytes of every file in the folder."""
    state = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        state.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return state.hexdigest()


def test_two_sets_have_the_same_bytes(tmp_path: Path) -> None:
    first, second = ensure(tmp_path / "a", SMALL), ensure(tmp_path / "b", SMALL)
    assert digest(first.parent) == digest(second.parent)


def test_a_longer_set_begins_with_the_shorter_one(tmp_path: Path) -> None:
    short = ensure(tmp_path / "a", SMALL).parent / "images/train/00005.jpg"
    longer = ensure(tmp_path / "b", replace(SMALL, train=8)).parent / "images/train/00005.jpg"
    assert short.read_bytes() == longer.read_bytes()


def test_splits_share_no_picture(tmp_path: Path) -> None:
    folder = ensure(tmp_path, ShapesConfig(train=8, val=8)).parent / "images"
    pictures = [path.read_bytes() for path in folder.rglob("*.jpg")]
    assert len(set(pictures)) == 16


def test_pixels_hang_on_the_draws_alone() -> None:
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda number: draw_scene(SceneConfig(), Draws(7, number)).image, range(8)))
    for number, image in enumerate(together):
        np.testing.assert_array_equal(image, draw_scene(SceneConfig(), Draws(7, number)).image)


def test_draws_go_on_where_they_stopped() -> None:
    draws, again = Draws(1, 2), Draws(1, 2)
    numbers = [draws.uniform() for _ in range(600)]
    assert numbers == [again.uniform() for _ in range(600)]
    assert len(set(numbers)) == 600
    assert 0.45 < np.mean(numbers) < 0.55
    assert Draws(2, 1).uniform() != numbers[0]
    assert sorted(draws.shuffled(range(5))) == list(range(5))
    assert {draws.integer(3, 5) for _ in range(200)} == {3, 4, 5}
    levels = draws.bytes(30, 50)
    assert levels.shape == (30, 50)
    assert 120 < levels.mean() < 135


def test_the_folder_is_a_yolo_data_set(tmp_path: Path) -> None:
    yaml_path = ensure(tmp_path, SMALL)
    described = yaml.safe_load(yaml_path.read_text())
    assert tuple(described["names"].values()) == CLASS_NAMES
    assert len(CLASS_NAMES) >= 5
    for split, count in (("train", 6), ("val", 3)):
        images = sorted((yaml_path.parent / described[split]).glob("*.jpg"))
        assert len(images) == count
        for image in images:
            decoded = cv2.imread(str(image))
            assert decoded is not None
            assert decoded.shape == (320, 320, 3)
            label_file = yaml_path.parent / "labels" / split / f"{image.stem}.txt"
            rows = np.loadtxt(label_file, ndmin=2)
            assert rows.shape[1] == 5
            assert set(rows[:, 0]) <= set(range(len(CLASS_NAMES)))
            low, high = rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2
            assert (low >= -1e-5).all()
            assert (high <= 1 + 1e-5).all()


@pytest.mark.parametrize("seed", range(12))
def test_boxes_are_tight_to_a_pixel(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The box agrees with the pixels that the shape's mask covers."""
    masks = []
    original = scene_module._filled

    def spy(*arguments: object) -> object:
        masks.append(original(*arguments))  # type: ignore[arg-type]
        return masks[-1]

    monkeypatch.setattr(scene_module, "_filled", spy)
    config = replace(PLAIN, least_visible=0.999)
    shapes = scene_module._place(config, Draws(11, seed))
    for shape in shapes:
        rows, columns = np.nonzero(shape.mask > 0)
        from_pixels = [
            shape.left + columns.min(),
            shape.top + rows.min(),
            shape.left + columns.max() + 1,
            shape.top + rows.max() + 1,
        ]
        assert np.abs(np.array(box_of(shape.polygon)) - from_pixels).max() < 1.0
    assert masks


def test_no_shape_is_mostly_hidden() -> None:
    config = SceneConfig(shapes=(8, 8), least_visible=0.6)
    for seed in range(6):
        shapes = scene_module._place(config, Draws(3, seed))
        top = np.full((config.size, config.size), -1)
        for number, shape in enumerate(shapes):
            place, part = shape.window(config.size)
            top[place][shape.mask[part] > 127] = number
        for number, shape in enumerate(shapes):
            assert (top == number).sum() >= 0.6 * area_of(shape.polygon)


def test_shapes_differ_from_the_ground() -> None:
    """Inside its box a shape changes the picture; what changes lies inside the box or in its shadow."""
    scene = draw_scene(PLAIN, Draws(5, 1))
    x1, y1, x2, y2 = np.rint(scene.boxes[0]).astype(int)
    inside = scene.image[y1:y2, x1:x2].reshape(-1, 3).astype(float)
    assert inside.std(axis=0).max() > 10


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_outlines_fit_their_circle(name: str) -> None:
    for seed in range(20):
        polygon = OUTLINES[name](Draws(seed, 0))
        assert np.hypot(polygon[:, 0], polygon[:, 1]).max() <= 1.0 + 1e-9
        assert 0.2 < area_of(polygon) <= math.pi


def test_a_rounded_corner_keeps_its_neighbours() -> None:
    corners = np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
    assert area_of(corners) == 1.0
    softened = scene_module.OUTLINES["square"](Draws(0, 0))
    assert area_of(softened) <= 2.0


def test_fields_stay_in_range() -> None:
    u, v = turned(40, 50, 0.7)
    assert u.shape == v.shape == (40, 50)
    fields = [maker(u, v, 12.0, Draws(1, 1)) for maker in PATTERNS.values()]
    for field in [*fields, clouds(40, 50, 3, Draws(2, 2)), contours(40, 50, Draws(3, 3))]:
        assert field.dtype == np.float32
        assert field.shape == (40, 50)
        assert field.min() >= 0.0
        assert field.max() <= 1.0
        assert field.max() > field.min()


def test_a_whole_set_is_not_made_again(tmp_path: Path) -> None:
    path = ensure(tmp_path, SMALL)
    before = (path.parent / MARKER).stat().st_mtime_ns
    assert ensure(tmp_path, SMALL) == path
    assert (path.parent / MARKER).stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["cut", "missing", "marker", "no marker", "yaml"])
def test_a_torn_set_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = ensure(tmp_path, SMALL).parent
    whole = digest(folder)
    picture = folder / "images/train/00002.jpg"
    if damage == "cut":
        picture.write_bytes(picture.read_bytes()[:100])
    elif damage == "missing":
        picture.unlink()
    elif damage == "marker":
        (folder / MARKER).write_text("{")
    elif damage == "no marker":
        (folder / MARKER).unlink()
    else:
        (folder / "data.yaml").unlink()
    ensure(tmp_path, SMALL)
    assert digest(folder) == whole
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_another_recipe_replaces_the_set(tmp_path: Path) -> None:
    folder = ensure(tmp_path, SMALL).parent
    ensure(tmp_path, replace(SMALL, val=4))
    assert json.loads((folder / MARKER).read_text())["recipe"]["val"] == 4
    assert len(list((folder / "images/val").iterdir())) == 4


def test_many_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda _: ensure(tmp_path, SMALL), range(4)))
    assert len(set(paths)) == 1
    assert digest(paths[0].parent) == digest(ensure(tmp_path / "alone", SMALL).parent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", paths[0].parent.name]


def test_the_cache_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "own"))
    assert ensure(config=SMALL).is_relative_to(tmp_path / "own")
    monkeypatch.delenv("PACELINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ensure(config=SMALL).is_relative_to(tmp_path / "xdg" / "paceline")


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="PACELINE_CACHE"):
        ensure(tmp_path / "file", SMALL)
