from __future__ import annotations

import colorsys
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from paceline.data import augment
from paceline.data import render as render_module
from paceline.data.augment import Transforms, map_boxes
from paceline.data.config import AugmentConfig
from paceline.data.plain import plain_of
from paceline.data.render import FILL, Workspace, letterbox, render
from paceline.letterbox import Letterbox
from paceline.native.library import best_level, library
from paceline.native.picture import draw_pictures
from paceline.native.resample import LEAST_LEVEL

Pixels = NDArray[np.uint8]
SIZE = 160
SIZES = np.array([[120, 160], [200, 90], [64, 64], [333, 401]])
ALIGNED = AugmentConfig(hsv_h=0, hsv_s=0, hsv_v=0, flipud=0.5)
TURNED = AugmentConfig(hsv_h=0, hsv_s=0, hsv_v=0, flipud=0.5, degrees=40, shear=10)


def plan(config: AugmentConfig, count: int, *, mosaic: bool = True, seed: int = 0) -> Transforms:
    samples = np.arange(count) % len(SIZES)
    draws = augment.draw(seed, np.arange(count), samples)
    images = np.concatenate(
        [samples[:, None], augment.partners_of_all(augment.partner_draws(config, draws), len(SIZES))], axis=1
    )
    return augment.plan(config, SIZE, draws, images, SIZES[images], np.ones_like(images), mosaic=mosaic)


def draw(transforms: Transforms, row: int, sources: list[Pixels]) -> Pixels:
    out = np.full((SIZE, SIZE, 3), 77, np.uint8)
    images = [sources[number] if number >= 0 else None for number in transforms.sources[row]]
    render(transforms, range(row, row + 1), [images], Workspace(SIZE), out[None], plain=plain_of(transforms))
    return out


def smooth_images(channels: int) -> list[Pixels]:
    """Images whose value is nearly linear over a pixel, so that the place of every pixel can be read from it."""
    images = []
    for height, width in SIZES:
        y, x = np.mgrid[:height, :width] + 0.5
        waves = [128 + 100 * np.sin(x / 30 + shift) * np.cos(y / 40) for shift in range(channels)]
        images.append(np.rint(np.stack(waves, -1)).astype(np.uint8))
    return images if channels == 3 else [np.ascontiguousarray(image[..., 0]) for image in images]


def slow_reference(
    transforms: Transforms, row: int, sources: list[Pixels]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Nearest source pixel of every output pixel, and where the picture has no seam within 1.5 px."""
    picture = np.full((SIZE, SIZE, 3), float(FILL))
    owner = np.full((SIZE, SIZE), -1)
    tiles = np.flatnonzero(transforms.sources[row] >= 0).tolist()
    inverses = {tile: np.linalg.inv(transforms.matrices[row, tile, :2, :2]) for tile in tiles}
    for y in range(SIZE):
        for x in range(SIZE):
            for tile in tiles:
                matrix, (left, top, right, bottom) = transforms.matrices[row, tile, :2], transforms.visible[row, tile]
                place = inverses[tile] @ (np.array([x + 0.5, y + 0.5]) - matrix[:, 2])
                if left <= place[0] < right and top <= place[1] < bottom:
                    image = sources[transforms.sources[row, tile]]
                    column, line = np.minimum(place.astype(int), (image.shape[1] - 1, image.shape[0] - 1))
                    picture[y, x], owner[y, x] = image[line, column], tile
    edge = cv2.morphologyEx(owner.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((5, 5))) > 0
    return picture, ~edge


@pytest.mark.parametrize("config", [ALIGNED, TURNED], ids=["aligned", "turned"])
@pytest.mark.parametrize("mosaic", [True, False])
def test_pixels_come_from_where_the_matrix_says(config: AugmentConfig, mosaic: bool) -> None:
    sources = smooth_images(3)
    transforms = plan(config, 2, mosaic=mosaic, seed=5)
    for row in range(2):
        expected, interior = slow_reference(transforms, row, sources)
        difference = np.abs(draw(transforms, row, sources) - expected)[interior]
        assert difference.mean() < 2
        assert difference.max() < 14


@pytest.mark.parametrize("config", [ALIGNED, TURNED], ids=["aligned", "turned"])
@pytest.mark.parametrize("mosaic", [True, False])
def test_edges_of_a_rectangle_lie_on_its_box(config: AugmentConfig, mosaic: bool) -> None:
    """White rectangles on black: each side is, on average along it, within 0.6 px of the mapped outline."""
    boxes = np.array([[37.0, 21, 131, 101], [9, 40, 70, 170], [10, 12, 50, 55], [40, 50, 330, 290]])
    sources = []
    for (height, width), box in zip(SIZES, boxes.astype(int), strict=True):
        image = np.zeros((height, width, 3), np.uint8)
        image[box[1] : box[3], box[0] : box[2]] = 255
        sources.append(image)
    transforms = plan(config, 24, mosaic=mosaic)
    num_sides = 0
    for row in range(len(transforms)):
        drawn = draw(transforms, row, sources)[..., 0] / 255.0
        for tile in np.flatnonzero(transforms.sources[row] >= 0):
            box, matrix = boxes[transforms.sources[row, tile]], transforms.matrices[row, tile, :2]
            for axis, end in ((0, 0), (0, 2), (1, 1), (1, 3)):
                offsets = edge_offsets(drawn, matrix, transforms.visible[row, tile], box, axis, end)
                if len(offsets) > 5:
                    num_sides += 1
                    assert abs(offsets.mean()) < 0.4
                    assert np.quantile(np.abs(offsets), 0.9) < 0.6
    assert num_sides > 40


def edge_offsets(
    drawn: NDArray[np.float64],
    matrix: NDArray[np.float64],
    visible: NDArray[np.float64],
    box: NDArray[np.float64],
    axis: int,
    end: int,
) -> NDArray[np.float64]:
    """Distances in px, along the side's normal, at which the drawn value passes 1/2, for points along one side."""
    other = 1 - axis
    along = np.linspace(box[other], box[other + 2], 40)[6:-6]
    points = np.empty((len(along), 2))
    points[:, axis], points[:, other] = box[end], along
    inwards = np.array([1.0, 0]) if axis == 0 else np.array([0, 1.0])
    inwards = inwards if end < 2 else -inwards
    mapped = points @ matrix[:, :2].T + matrix[:, 2]
    normal = np.linalg.inv(matrix[:, :2]).T @ inwards
    normal /= np.linalg.norm(normal)
    margin = 4 / np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    inside = ((points > visible[:2] + margin) & (points < visible[2:] - margin)).all(axis=1)
    inside &= ((mapped > 5) & (mapped < SIZE - 5)).all(axis=1)
    if not inside.any() or (box[2:] - box[:2]).min() * np.sqrt(abs(np.linalg.det(matrix[:, :2]))) < 10:
        return np.empty(0)
    steps = np.linspace(-3, 3, 61)
    probes = mapped[inside][:, None] + steps[None, :, None] * normal - 0.5
    maps = probes.astype(np.float32)
    profile = cv2.remap(drawn.astype(np.float32), maps[..., 0], maps[..., 1], cv2.INTER_LINEAR)
    # Dark outside, bright inside: the brightness missing from the profile is where the edge lies.
    return 3 - profile.sum(axis=1) * (steps[1] - steps[0])


@pytest.mark.parametrize("config", [AugmentConfig(flipud=0.5), AugmentConfig(degrees=20)], ids=["aligned", "turned"])
def test_images_without_colour_look_the_same_in_one_plane(config: AugmentConfig) -> None:
    planes = smooth_images(1)
    coloured = [cv2.cvtColor(plane, cv2.COLOR_GRAY2RGB) for plane in planes]
    mixed = [plane if number % 2 else coloured[number] for number, plane in enumerate(planes)]
    transforms = plan(config, 12)
    for row in range(12):
        expected = draw(transforms, row, coloured)
        np.testing.assert_array_equal(draw(transforms, row, planes), expected)
        np.testing.assert_array_equal(draw(transforms, row, mixed), expected)


def test_nothing_of_the_buffer_before_is_left() -> None:
    sources = smooth_images(3)
    for config in (ALIGNED, TURNED):
        transforms = plan(config, 6, mosaic=False)
        workspace = Workspace(SIZE)
        for row in range(6):
            images = [sources[number] if number >= 0 else None for number in transforms.sources[row]]
            drawn = []
            for before in (0, 255):
                out = np.full((SIZE, SIZE, 3), before, np.uint8)
                workspace.colour.fill(before)
                render(transforms, range(row, row + 1), [images], workspace, out[None], plain=plain_of(transforms))
                drawn.append(out)
            np.testing.assert_array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize("colour", ["none", "some", "all"])
@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(flipud=0.5),
        AugmentConfig(flipud=0.5, mixup=0.3, cutmix=0.5),
        AugmentConfig(bgr=0.3, greyscale=0.3),
        AugmentConfig(degrees=9),
    ],
    ids=["plain", "mixed", "channels", "turned"],
)
def test_pictures_in_one_call_are_the_same_pictures(
    colour: str, config: AugmentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    planes, transforms = smooth_images(1), plan(config, 32)
    coloured = smooth_images(3)
    sources = [
        planes[i] if colour == "none" or (colour == "some" and i % 2) else coloured[i] for i in range(len(planes))
    ]
    assert set(np.unique(transforms.halvings)) == {0, 1, 2}, "two of which it draws"
    images = [[sources[number] if number >= 0 else None for number in numbers] for numbers in transforms.sources]
    drawn = np.empty((2, len(transforms), SIZE, SIZE, 3), np.uint8)
    drawn[0], drawn[1] = 0, 255
    in_one_call: list[bool] = []

    def counted(*given: Any, **named: Any) -> list[bool]:
        in_one_call.extend(draw_pictures(*given, **named))
        return in_one_call[-len(given[2]) :]

    monkeypatch.setattr(render_module, "draw_pictures", counted)
    plain, workspace = plain_of(transforms), Workspace(SIZE)
    for rows in (range(5), range(5, 6), range(6, 32)):
        these = slice(rows.start, rows.stop)
        render(transforms, rows, images[these], workspace, drawn[0, these], plain=plain)
        render(transforms, rows, images[these], workspace, drawn[1, these])
    assert np.array_equal(drawn[0], drawn[1])
    found = library()
    if found is not None and best_level(found) >= LEAST_LEVEL:
        assert in_one_call == plain.is_plain.tolist()
        assert sum(in_one_call) in (range(1) if config.degrees else range(6, 32))


def test_a_picture_that_is_put_in_anothers_place_is_drawn_there() -> None:
    config = AugmentConfig(flipud=0.5, mixup=0.5)
    transforms, other = plan(config, 20), plan(config, 20, seed=7)
    plain = plain_of(transforms)
    for row in range(20):
        transforms.put(row, other.row(19 - row))
        plain.put(row, plain_of(other.row(19 - row)))
    expected = plain_of(other)
    for name, values in vars(plain).items():
        assert np.array_equal(values[::-1], vars(expected)[name]), name
    assert 0 < expected.is_plain.sum() < 20
    images = smooth_images(3)
    assert np.array_equal(draw(transforms, 3, images), draw(other, 16, images))


def test_large_images_are_averaged_not_skipped() -> None:
    """A chequerboard of single pixels becomes grey when it shrinks four times."""
    board = (np.indices((640, 640)).sum(axis=0) % 2 * 255).astype(np.uint8)
    config = AugmentConfig(scale=0, translate=0, fliplr=0, hsv_h=0, hsv_s=0, hsv_v=0)
    one = np.zeros((1, 4), np.int64)
    draws = augment.draw(0, np.zeros(1, np.int64), np.zeros(1, np.int64))
    sizes = np.full((1, 4, 2), 640)
    transforms = augment.plan(config, SIZE, draws, one, sizes, np.ones((1, 4), np.int64), mosaic=False)
    drawn = draw(transforms, 0, [board])
    assert np.abs(drawn.astype(int) - 128).max() <= 2


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "opencv"])
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_jitter_is_hsv_of_the_plain_picture(
    channels: int, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the definition of hue, saturation and value, pixel by pixel."""
    if kernels and library() is None:  # test_library fails where a compiler is there and they were not built
        pytest.skip("the kernels were not built")
    if not kernels:
        monkeypatch.setattr("paceline.native.jitter.library", lambda: None)
    sources = smooth_images(channels)
    config = AugmentConfig(flipud=0.5, hsv_h=0.2)
    jittered = plan(config, 3)
    plain = replace(jittered, hsv=np.tile([0.0, 1.0, 1.0], (3, 1)))
    for row in range(3):
        shift, saturation, value = jittered.hsv[row]
        expected = np.array([
            colorsys.hsv_to_rgb((hue + shift) % 1, min(strength * saturation, 1), min(bright * value, 1))
            for hue, strength, bright in (
                colorsys.rgb_to_hsv(*pixel) for pixel in draw(plain, row, sources).reshape(-1, 3) / 255
            )
        ]).reshape(SIZE, SIZE, 3)  # fmt: skip
        difference = np.abs(draw(jittered, row, sources) / 255 - expected) * 255
        assert difference.mean() < (0.5 if kernels else 1.5)
        assert difference.max() < (1 if kernels else 8)


@pytest.mark.parametrize("shape", [(100, 200), (200, 100), (64, 64), (500, 333), (32, 1), (1, 50)])
def test_letterbox_covers_exactly_its_place(shape: tuple[int, int]) -> None:
    box = Letterbox.fit(*shape, 64, 96)
    out = np.zeros((64, 96, 3), np.uint8)
    letterbox(np.full((*shape, 3), 200, np.uint8), box, out)
    covered = (out == 200).all(axis=-1)
    expected = np.zeros_like(covered)
    expected[box.top : box.top + box.scaled_height, box.left : box.left + box.scaled_width] = True
    np.testing.assert_array_equal(covered, expected)
    assert (out[~expected] == FILL).all()


def test_letterbox_puts_edges_where_it_puts_boxes() -> None:
    image = np.zeros((300, 500), np.uint8)
    image[60:210, 100:350] = 255
    box = Letterbox.fit(300, 500, SIZE, SIZE)
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    letterbox(image, box, out)
    left, top, right, bottom = box.forward(np.array([[100.0, 60, 350, 210]]))[0]
    across, down = out[80, :, 0] / 255, out[box.top : box.top + box.scaled_height, 70, 0] / 255
    assert abs(across[:80].sum() - (80 - left)) < 0.6
    assert abs(across[80:].sum() - (right - 80)) < 0.6
    assert abs(down[: 80 - box.top].sum() - (80 - top)) < 0.6
    assert abs(down[80 - box.top :].sum() - (bottom - 80)) < 0.6


def test_bounds_of_a_box_follow_its_corners() -> None:
    turn = np.array([[0.0, -1, 10], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(map_boxes(turn, np.array([1.0, 2, 3, 6])), [4, 1, 8, 3])
