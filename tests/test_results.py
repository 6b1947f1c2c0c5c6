"""Results: boxes in four notations, JSON, label files and pictures say the same."""

from __future__ import annotations

import copy
import json
import pickle
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from paceline.errors import UserError
from paceline.results import Boxes, Results

if TYPE_CHECKING:
    from pathlib import Path


def some_results(count: int = 3) -> Results:
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
    boxes = Boxes(
        xyxy=corners * torch.tensor([60.0, 40.0, 60.0, 40.0]),
        conf=torch.linspace(0.9, 0.3, count),
        cls=torch.arange(count) % 2,
        orig_shape=(40, 60),
    )
    image = np.full((40, 60, 3), (255, 0, 0), np.uint8)  # blue
    return Results(path="some/street.jpg", orig_img=image, boxes=boxes, names={0: "disc", 1: "ring"})


def test_notations_agree() -> None:
    boxes = some_results(5).boxes
    size = torch.tensor([60.0, 40.0, 60.0, 40.0])
    assert_close(boxes.xyxyn * size, boxes.xyxy)
    assert_close(boxes.xywhn * size, boxes.xywh)
    assert_close(boxes.xywh[:, :2] - boxes.xywh[:, 2:] / 2, boxes.xyxy[:, :2])
    assert_close(boxes.xywh[:, :2] + boxes.xywh[:, 2:] / 2, boxes.xyxy[:, 2:])
    assert_close(boxes.data, torch.cat([boxes.xyxy, boxes.conf[:, None], boxes.cls[:, None].float()], dim=1))


def test_iterating_gives_the_boxes_one_by_one() -> None:
    boxes = some_results(4).boxes
    assert len(boxes) == 4
    assert_close(torch.cat([box.xyxy for box in boxes]), boxes.xyxy)
    assert_close(boxes[-1].conf, boxes.conf[-1:])
    assert_close(boxes[boxes.cls == 1].xyxy, boxes.xyxy[1::2])
    with pytest.raises(IndexError):
        boxes[4]


def test_json_and_label_files_say_what_the_tensors_say(tmp_path: Path) -> None:
    results = some_results(3)
    entries = json.loads(results.to_json())
    corners = torch.tensor([[entry["box"][key] for key in ("x1", "y1", "x2", "y2")] for entry in entries])
    assert_close(corners, results.boxes.xyxy, atol=1e-3, rtol=0)
    assert [entry["name"] for entry in entries] == ["disc", "ring", "disc"]
    assert [entry["class"] for entry in entries] == [0, 1, 0]
    rows = torch.from_numpy(np.loadtxt(results.save_txt(tmp_path / "labels" / "a.txt", save_conf=True))).float()
    assert_close(rows[:, 0], results.boxes.cls.float())
    assert_close(rows[:, 1:5], results.boxes.xywhn, atol=1e-5, rtol=0)
    assert_close(rows[:, 5], results.boxes.conf, atol=1e-5, rtol=0)
    assert np.loadtxt(results.save_txt(tmp_path / "b.txt")).shape == (3, 5)


def test_without_boxes_everything_is_empty(tmp_path: Path) -> None:
    results = some_results(0)
    assert str(results) == "nothing"
    assert json.loads(results.to_json()) == []
    assert results.save_txt(tmp_path / "a.txt").read_text() == ""
    assert np.array_equal(results.plot(), results.orig_img)
    assert results.boxes.data.shape == (0, 6)


def test_text_counts_classes() -> None:
    assert str(some_results(3)) == "2 disc, 1 ring"


def test_pictures_are_blue_green_red(tmp_path: Path) -> None:
    results = some_results(1)
    plot = results.plot()
    untouched = (plot == results.orig_img).all(axis=2)
    assert 0 < untouched.sum() < untouched.size
    assert np.array_equal(cv2.imread(str(results.save(tmp_path / "a.png"))), plot)
    assert results.save(filename=tmp_path / "b.png").is_file()  # as other trainers call it


def test_another_kind_of_picture_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.jpg or \.png"):
        some_results().save(tmp_path / "a.xyz")


def test_a_list_of_results_is_short_to_read() -> None:
    results = some_results(3)
    assert repr([results]) == "[<Results some/street.jpg 60 x 40: 2 disc, 1 ring>]"


def test_attributes_of_other_trainers_are_answered() -> None:
    results = some_results(1)
    with pytest.raises(AttributeError, match="no attribute 'show': no windows are opened"):
        results.show  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'cpu': its xyxy"):
        results.boxes.cpu()  # type: ignore[attr-defined]
    assert not hasattr(results, "masks")
    assert copy.deepcopy(results).boxes.conf.tolist() == results.boxes.conf.tolist()
    assert len(pickle.loads(pickle.dumps(results))) == 1
