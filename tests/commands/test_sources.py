"""Sources: files, folders, patterns, lists and arrays lead to the same images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from paceline.commands.sources import find_images
from paceline.data.headers import BadImage
from paceline.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("b.png", "a.png", "sub/c.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.full((4, 6, 3), (number, 100, 200), np.uint8))
    (tmp_path / "notes.md").write_text("no image")
    return tmp_path


def paths(source: object) -> list[str]:
    return [Path(image.path).name for image in find_images(source)]  # type: ignore[arg-type]


def test_ways_to_name_images_agree(folder: Path) -> None:
    (folder / "list.txt").write_text(f"a.png\n\n{folder}/b.png\n")
    expected = ["a.png", "b.png"]
    assert paths(folder) == paths(str(folder)) == expected
    assert paths(f"{folder}/*.png") == expected
    assert paths(f"{folder}/*") == expected
    assert paths([folder / "a.png", str(folder / "b.png")]) == expected
    assert paths(folder / "list.txt") == expected
    assert paths(f"{folder}/**/*.png") == ["a.png", "b.png", "c.png"]


def test_files_and_arrays_have_the_same_pixels(folder: Path) -> None:
    (image,) = find_images(folder / "a.png")
    pixels = image.load()
    assert pixels[0, 0].tolist() == [1, 100, 200]
    images = find_images([pixels, folder / "b.png", pixels])
    assert [Path(entry.path).name for entry in images] == ["image0", "b.png", "image2"]
    assert np.array_equal(images[0].load(), pixels)


def test_arrays_get_three_colours() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for array in (grey, grey[..., None], np.dstack([grey] * 4)):
        (image,) = find_images(array)
        assert np.array_equal(image.load(), np.dstack([grey] * 3))


def test_pictures_of_pil_have_the_pixels_of_arrays(folder: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    (image,) = find_images(folder / "a.png")
    with pil.open(folder / "a.png") as picture:
        (same,) = find_images(picture)
        (grey,) = find_images(picture.convert("L"))
    assert np.array_equal(same.load(), image.load())
    assert grey.load().shape == image.load().shape
    assert [entry.path for entry in find_images([picture.copy(), picture.copy()])] == ["image0", "image1"]


def test_names_with_brackets_are_files_before_they_are_patterns(folder: Path) -> None:
    (folder / "a.png").rename(folder / "a[1].png")
    assert paths(folder / "a[1].png") == ["a[1].png"]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("none.jpg", "check the path"),
        ("*.none", "check the pattern"),
        ("https://example.org/a.jpg", "nothing is downloaded"),
        ("0", "camera"),
        ("notes", "holds no images"),
        ("film.mp4", "is a video"),
        ("empty.txt", "names no images"),
        ([], "no image"),
        (0, "source=0 means a camera"),
        (3.5, "float are not read"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((2, 4, 4, 3), np.uint8), "2 x 4 x 4 x 3"),
        (np.zeros((0, 4, 3), np.uint8), "0 x 4 x 3"),
    ],
)
def test_mistakes(source: object, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "film.mp4").touch()
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=sentence):
        find_images(source)  # type: ignore[arg-type]


def test_a_file_that_is_no_image_is_noticed_when_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("<html></html>")
    (image,) = find_images(tmp_path / "a.jpg")
    with pytest.raises(BadImage, match="web page"):
        image.load()
