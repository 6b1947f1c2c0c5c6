"""Outputs and keys against the oracle: all of it where it lies beside the repository, a sample of it everywhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fill_rule import SIZE_HW, fill, images

from paceline.boxes import anchor_points, decode_boxes, xyxy_to_cxcywh
from paceline.models.registry import build_model

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 5e-5
"""Of the largest absolute value of an output: rounding of float32 is 2e-6, a wrong attention scale is 3.5e-4."""


@torch.no_grad()
def answers(name: str) -> dict[str, np.ndarray]:
    """The three outputs in the layout of the oracle: B, channels, points."""
    boxes, scores = fill(build_model(name, 80))(images())
    decoded = xyxy_to_cxcywh(decode_boxes(boxes, *anchor_points(SIZE_HW)))
    prediction = torch.cat((decoded, scores.sigmoid()), dim=2)
    outputs = {"boxes": boxes, "scores": scores, "prediction": prediction}
    return {key: output.transpose(1, 2).numpy() for key, output in outputs.items()}


def shape_lines(name: str) -> list[str]:
    """Lines of key, tab, shape, as in the oracle's tables."""
    state = build_model(name, 80).state_dict()
    return [f"{key}\t{'x'.join(map(str, tensor.shape)) or 'scalar'}" for key, tensor in state.items()]


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo11m"])
def test_keys_and_shapes_are_those_of_the_checkpoints(name: str, shared: Path) -> None:
    expected = (shared / "facts" / "oracle" / f"{name}.keys.tsv").read_text().splitlines()
    assert sorted(shape_lines(name)) == sorted(expected)


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo11m"])
def test_outputs_are_those_of_the_oracle(name: str, shared: Path) -> None:
    ours = answers(name)
    with np.load(shared / "facts" / "oracle" / f"{name}.npz") as oracle:
        for key, output in ours.items():
            scale = np.abs(oracle[key]).max()
            np.testing.assert_allclose(output, oracle[key], rtol=0, atol=TOLERANCE * scale, err_msg=key)


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_a_sample_of_keys_and_outputs_is_that_of_the_oracle(name: str) -> None:
    fixture = json.loads((FIXTURES / f"{name}.json").read_text())
    digest = hashlib.sha256("\n".join(sorted(shape_lines(name))).encode()).hexdigest()
    assert digest == fixture["keys_sha256"]
    for key, output in answers(name).items():
        sample = fixture["outputs"][key]
        assert list(output.shape) == sample["shape"]
        values = output.reshape(-1)[sample["index"]]
        np.testing.assert_allclose(values, sample["value"], rtol=0, atol=TOLERANCE * sample["max_abs"], err_msg=key)
        assert abs(output.mean(dtype=np.float64) - sample["mean"]) <= TOLERANCE * sample["max_abs"]
        assert abs(np.abs(output).max() - sample["max_abs"]) <= TOLERANCE * sample["max_abs"]
