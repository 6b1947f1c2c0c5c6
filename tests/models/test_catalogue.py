from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from paceline.errors import UserError
from paceline.models.catalogue import CATALOGUE, ModelInfo, find_model, model_names
from paceline.models.fusion import fuse
from paceline.models.registry import FAMILIES, build_model
from paceline.models.statistics import count_gflops, count_parameters

UNCOUNTED_GFLOPS = (80 + 64 + 16 * 4) * 8400 * 2 / 1e9
"""What the published figures seem to count beside our convolutions: the biases of the head, and the decoding of its
bins as a convolution. It decides the last digit of yolov8l and of no other."""


@pytest.mark.parametrize("info", CATALOGUE, ids=model_names())
def test_the_network_is_what_the_catalogue_says(info: ModelInfo) -> None:
    with torch.device("meta"):
        model = build_model(info.name, 80)
    assert count_parameters(model) == info.params
    assert count_parameters(fuse(model)) == info.params_fused
    assert round(count_gflops(model, 640) + UNCOUNTED_GFLOPS, 1) == info.gflops


def test_names_are_a_family_and_a_size() -> None:
    assert model_names() == tuple(family + size for family in FAMILIES for size in "nsmlx")
    assert all(info.name == info.family + info.size for info in CATALOGUE)
    assert all(find_model(info.name) is info for info in CATALOGUE)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("yolo11q", "yolo11"),
        ("yolov11n", "yolo11n"),
        ("yolo8n", "yolov8n"),
        ("YOLO11m", "yolo11m"),
        ("yolo11", "yolo11n"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=f'no model "{typed}": did you mean "{meant}') as caught:
        build_model(typed, 80)
    assert "\n" not in str(caught.value)


def test_a_name_like_no_other_gets_the_list() -> None:
    with pytest.raises(UserError, match=r"choose one of yolov8n, .*, yolo11x"):
        find_model("resnet")


def test_the_catalogue_is_read_without_torch() -> None:
    script = "import sys, paceline.models.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
