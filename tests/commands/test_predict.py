"""Prediction with a network that finds red rectangles exactly: places, colours, batches and files are checked."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from paceline.boxes import anchor_points
from paceline.commands.predict import FileNames, Predictor, predict
from paceline.commands.weights import LoadedNetwork
from paceline.errors import UserError
from paceline.evaluation.config import PostprocessConfig
from paceline.options import PredictOptions

RED = (0, 0, 255)
"""In the order blue, green, red."""


class RedFinder(nn.Module):
    """Says for each image where its red pixels are: one point, class 1, the score a half."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        points, strides = anchor_points((images.shape[2], images.shape[3]))
        boxes = torch.zeros(len(images), len(points), 4)
        scores = torch.full((len(images), len(points), 2), -20.0)
        for row, image in enumerate(images):
            ys, xs = torch.nonzero((image[0] > 0.5) & (image[1] < 0.2) & (image[2] < 0.2), as_tuple=True)
            if len(xs):
                low, high = torch.stack([xs.min(), ys.min()]), torch.stack([xs.max() + 1, ys.max() + 1])
                boxes[row, 0] = torch.cat([points[0] - low, high - points[0]]) / strides[0]
                scores[row, 0, 1] = 0.0
        return boxes, scores


@pytest.fixture
def predictor() -> Predictor:
    loaded = LoadedNetwork(network=RedFinder(), model="red", names=("other", "red"), imgsz=128, source=None)  # type: ignore[arg-type]
    return Predictor(loaded, torch.device("cpu"))


def picture(height: int, width: int, box: tuple[int, int, int, int] | None) -> np.ndarray:
    image = np.full((height, width, 3), 200, np.uint8)
    if box is not None:
        image[box[1] : box[3], box[0] : box[2]] = RED
    return image


CASES = [
    (64, 64, (8, 16, 40, 48)),
    (128, 128, (0, 0, 128, 30)),
    (90, 300, (30, 20, 200, 70)),
    (257, 101, (5, 100, 90, 250)),
]


@pytest.mark.parametrize(("height", "width", "box"), CASES)
def test_boxes_are_in_pixels_of_the_image(
    predictor: Predictor, height: int, width: int, box: tuple[int, int, int, int]
) -> None:
    image = picture(height, width, box)
    (result,) = predict(PredictOptions.from_flat({"save": False}), image, predictor=predictor)
    pixel = max(height, width) / 128 + 0.5
    assert_close(result.boxes.xyxy, torch.tensor([box]).float(), atol=pixel, rtol=0)
    assert result.boxes.cls.tolist() == [1]
    assert result.boxes.conf.tolist() == [0.5]
    assert (result.orig_shape, result.names) == ((height, width), {0: "other", 1: "red"})
    assert set(result.speed) == {"preprocess", "inference", "postprocess"}


def test_batched_equals_one_by_one(predictor: Predictor) -> None:
    images = [picture(*case) for case in CASES] + [picture(50, 70, None)]
    batched = predictor(["a"] * 5, images, PostprocessConfig())
    for result, image in zip(batched, images, strict=True):
        (single,) = predictor(["a"], [image], PostprocessConfig())
        assert torch.equal(result.boxes.data, single.boxes.data)
    assert [len(result) for result in batched] == [1, 1, 1, 1, 0]


def test_the_size_can_be_chosen(predictor: Predictor) -> None:
    image = picture(512, 512, (1, 1, 511, 511))
    (result,) = predict(PredictOptions.from_flat({"save": False, "imgsz": 512}), image, predictor=predictor)
    assert result.boxes.xyxy.tolist() == [[1, 1, 511, 511]]


def test_classes_are_filtered_and_checked(predictor: Predictor) -> None:
    image = picture(64, 64, (8, 16, 40, 48))
    (result,) = predict(PredictOptions.from_flat({"save": False, "classes": 0}), image, predictor=predictor)
    assert len(result) == 0
    with pytest.raises(UserError, match="classes 0 to 1"):
        predict(PredictOptions.from_flat({"classes": 2}), image, predictor=predictor)


def test_files_and_arrays_give_the_same(predictor: Predictor, tmp_path: Path) -> None:
    image = picture(90, 120, (10, 20, 60, 80))
    cv2.imwrite(str(tmp_path / "a.png"), image)
    from_file, from_array = predict(
        PredictOptions.from_flat({"save": False}), [tmp_path / "a.png", image], predictor=predictor
    )
    assert torch.equal(from_file.boxes.data, from_array.boxes.data)
    assert np.array_equal(from_file.orig_img, image)


def options_for(tmp_path: Path, **more: object) -> PredictOptions:
    source = {"source": [str(tmp_path / "images")]}
    return PredictOptions.from_flat({"project": tmp_path / "runs", "batch": 2} | source | more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "more").mkdir(parents=True)
    for number, case in enumerate(CASES):
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), picture(*case))
    return tmp_path


def test_everything_that_is_asked_for_is_written(folder: Path, predictor: Predictor) -> None:
    cv2.imwrite(str(folder / "images" / "0.bmp"), picture(*CASES[0]))  # a second file with the same stem
    options = options_for(folder, save_txt=True, save_conf=True, save_json=True)
    results = list(predict(options, predictor=predictor))
    run = folder / "runs" / "predict"
    stems = ["0", "0-2", "1", "2", "3"]
    assert {path.name for path in run.glob("*.jpg")} == {f"{stem}.jpg" for stem in stems}
    for stem, result in zip(stems, results, strict=True):
        row = np.loadtxt(run / "labels" / f"{stem}.txt")
        assert row[0] == 1
        assert row[1:5].tolist() == pytest.approx(result.boxes.xywhn[0].tolist(), abs=1e-5)
    entries = json.loads((run / "predictions.json").read_text())
    assert [Path(entry["file"]).name for entry in entries] == [Path(result.path).name for result in results]
    assert (entries[3]["height"], entries[3]["width"]) == (90, 300)
    list(predict(options, predictor=predictor))
    assert (folder / "runs" / "predict2").is_dir()


def test_bad_files_are_left_out_and_named(folder: Path, predictor: Predictor, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "images" / "00.jpg").write_text("<html></html>")
    with caplog.at_level(logging.WARNING, "paceline"):
        results = list(predict(options_for(folder), predictor=predictor))
    assert len(results) == len(CASES)
    assert "00.jpg is a web page" in caplog.text


def test_only_bad_files_are_a_mistake_and_write_nothing(tmp_path: Path, predictor: Predictor) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_text("<html></html>")
    with pytest.raises(UserError, match=r"a\.jpg is a web page"):
        list(predict(options_for(tmp_path), predictor=predictor))
    assert not (tmp_path / "runs").exists()


def test_mistakes_are_found_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="something to look at"):
        predict(PredictOptions())
    with pytest.raises(UserError, match="needs weights"):
        predict(PredictOptions(), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="check the path"):
        predict(PredictOptions.from_flat({"model": str(tmp_path)}), tmp_path / "none.jpg")


def plain_names(paths: list[str]) -> list[str]:
    """Count up from 2 for every image anew until there is a name that nobody has."""
    names: list[str] = []
    for path in paths:
        stem = Path(path).stem
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def test_each_image_has_files_of_its_own_name() -> None:
    random = np.random.default_rng(0)
    stems = ["a", "a-1", "a-2", "a-2-2", "a-3", "b"]
    paths = [f"{folder}/{stems[random.integers(len(stems))]}.jpg" for folder in range(200)]
    names = FileNames()
    found = [names.new(path) for path in paths]
    assert found == plain_names(paths)
    assert len(set(found)) == len(paths)


def test_equal_stems_from_many_folders_are_named_at_once() -> None:
    start, names = time.process_time(), FileNames()
    assert [names.new(f"{folder}/frame.jpg") for folder in range(20_000)][-1] == "frame-20000"
    assert time.process_time() - start < 5  # some 0.1 s; a search from 2 for each would try 200 million names
