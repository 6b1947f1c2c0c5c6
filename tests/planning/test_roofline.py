from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from paceline.models.blocks import Attention
from paceline.models.catalogue import find_model, model_names
from paceline.models.registry import build_model
from paceline.models.statistics import Arithmetic, arithmetic_of, count_gflops, count_parameters
from paceline.planning.roofline import (
    PARTS,
    Pass,
    Rates,
    StepWork,
    backward_passes,
    evaluation_passes,
    forward_passes,
    seconds_of,
    step_work,
)

UNCOUNTED_GFLOPS = (80 + 64 + 16 * 4) * 8400 * 2 / 1e9
"""See `tests/models/test_catalogue.py`."""
H200 = Rates(operations_per_s=790e12, bytes_per_s=4.8e12)
"""Of one H200: measured for bfloat16, and published for its memory."""
# yolo11 at 640 px, batch 64, bf16: images/s of the network's own passes at the limit, and at 60 % and 80 % of it
PUBLISHED = {"n": (9300, 7200), "s": (4600, 3350), "m": (1870, 1310), "l": (1440, 1020), "x": (800, 540)}


@cache
def arithmetic(name: str, imgsz: int = 640) -> tuple[Arithmetic, ...]:
    with torch.device("meta"):
        return arithmetic_of(build_model(name, 80), imgsz)


@cache
def parameters(name: str) -> int:
    with torch.device("meta"):
        return count_parameters(build_model(name, 80))


def work(name: str = "yolo11n", images: int = 64, imgsz: int = 640, itemsize: int = 2) -> StepWork:
    return step_work(arithmetic(name, imgsz), images=images, itemsize=itemsize, parameters=parameters(name))


@pytest.mark.parametrize("name", model_names())
def test_operations_are_those_of_the_catalogue(name: str) -> None:
    convolutions = [entry for entry in arithmetic(name) if entry.kind == "convolution"]
    forward = sum(p.operations for entry in convolutions for p in forward_passes(entry, images=1, itemsize=2))
    assert round(forward / 1e9 + UNCOUNTED_GFLOPS, 1) == find_model(name).gflops
    with torch.device("meta"):
        assert forward / 1e9 == pytest.approx(count_gflops(build_model(name, 80)), rel=1e-12)


def test_backward_is_twice_forward_but_for_the_first_convolution() -> None:
    first, *others = [entry for entry in arithmetic("yolo11n") if entry.kind == "convolution"]

    def operations(passes: tuple[Pass, ...]) -> float:
        return sum(entry.operations for entry in passes)

    for entry in others:
        assert operations(backward_passes(entry, images=3, itemsize=2)) == 2 * 3 * entry.operations
    assert first.takes_images
    assert operations(backward_passes(first, images=3, itemsize=2)) == 3 * first.operations


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_table_of_limits_of_an_h200(size: str) -> None:
    nodes = work(f"yolo11{size}").nodes.values()
    limit, attainable = (64 / sum(seconds_of(p, rates) for p in nodes) for rates in (H200, H200.attainable()))
    assert (limit, attainable) == pytest.approx(PUBLISHED[size], rel=0.015)


def test_twice_the_images_are_twice_the_arithmetic_and_no_more_weights() -> None:
    one, two = work(images=8), work(images=16)
    assert two.operations == 2 * one.operations
    assert one.bytes < two.bytes < 2 * one.bytes
    assert two.parts["optimiser"] == one.parts["optimiser"]
    assert two.seconds(H200) < 2 * one.seconds(H200)


def test_four_times_the_pixels_are_four_times_the_convolutions() -> None:
    small = sum(entry.operations for entry in arithmetic("yolo11s", 320) if entry.kind == "convolution")
    large = sum(entry.operations for entry in arithmetic("yolo11s", 640) if entry.kind == "convolution")
    assert large == 4 * small
    (few,), (many,) = ([e.operations for e in arithmetic("yolo11s", px) if e.kind == "attention"] for px in (320, 640))
    assert many == 16 * few  # every cell attends to every cell


@pytest.mark.parametrize("name", ["yolo11n", "yolov8s"])
def test_a_nodes_cost_is_the_sum_of_its_convolutions(name: str) -> None:
    whole = work(name)
    with torch.device("meta"):
        network = build_model(name, 80)
    for number, node in enumerate(network.nodes):
        convolutions = sum(isinstance(m, nn.Conv2d) for key, m in node.module.named_modules() if "dfl" not in key)
        entries = [entry for entry in arithmetic(name) if entry.node == number]
        assert sum(entry.kind == "convolution" for entry in entries) == convolutions
        alone = [forward_passes(entry, images=64, itemsize=2) for entry in entries]
        alone += [backward_passes(entry, images=64, itemsize=2) for entry in entries]
        expected = sum(seconds_of(passes, H200) for passes in alone)
        assert seconds_of(whole.nodes.get(number, ()), H200) == pytest.approx(expected)


def test_parts_are_the_whole_and_nodes_are_forward_and_backward() -> None:
    whole = work()
    assert tuple(whole.parts) == PARTS
    assert sum(seconds_of(passes, H200) for passes in whole.parts.values()) == pytest.approx(whole.seconds(H200))
    nodes = sum(seconds_of(passes, H200) for passes in whole.nodes.values())
    outputs = whole.parts["backward"][0]  # the loss's gradient, which belongs to no node
    both = seconds_of(whole.parts["forward"] + whole.parts["backward"], H200)
    assert nodes + outputs.seconds(H200) == pytest.approx(both)


@pytest.mark.parametrize("name", ["yolo11n", "yolo11x"])
def test_no_step_is_predicted_beyond_a_limit(name: str) -> None:
    whole = work(name)
    seconds = whole.seconds(H200)
    assert whole.operations / seconds <= H200.operations_per_s
    assert whole.bytes / seconds <= H200.bytes_per_s
    attainable = H200.attainable()
    assert seconds / 0.8 <= whole.seconds(attainable) <= seconds / 0.6
    assert 0 < whole.memory_share(H200) < 1
    assert whole.memory_share(Rates(operations_per_s=1e30, bytes_per_s=1.0)) == 1


def test_a_pass_takes_the_longer_of_both() -> None:
    rates = Rates(operations_per_s=10.0, bytes_per_s=2.0)
    assert Pass(operations=30, bytes=4).seconds(rates) == 3
    assert Pass(operations=30, bytes=8).seconds(rates) == 4


def test_a_convolution_by_hand() -> None:
    entry = Arithmetic(
        name="model.0.conv", kind="convolution", operations=1000, inputs=10, outputs=20, weights=5, normed=True
    )
    assert forward_passes(entry, images=2, itemsize=4) == (Pass(operations=2000, bytes=4 * 65), Pass(bytes=4 * 120))
    gradient = Pass(operations=2000, bytes=4 * 65)
    assert backward_passes(entry, images=2, itemsize=4) == (Pass(bytes=4 * 200), gradient, gradient)
    assert evaluation_passes([entry], images=2, itemsize=4) == (gradient,)


def test_optimisers_with_more_state_move_more() -> None:
    sgd = step_work((), images=1, itemsize=2, parameters=100, states=1).bytes
    adam = step_work((), images=1, itemsize=2, parameters=100, states=2).bytes
    assert adam - sgd == 2 * 4 * 100  # read and written


def test_attention_is_counted_like_two_products_of_matrices() -> None:
    attention = Attention(128, num_heads=2)

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 128, 1, bias=False)
            self.attn = attention

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            attended: torch.Tensor = self.attn(self.stem(x))
            return attended

    (entry,) = [e for e in arithmetic_of(Alone(), 8) if e.kind == "attention"]
    cells, key, value = 64, 32, 64
    assert entry.operations == 2 * (2 * cells * key * cells + 2 * cells * cells * value)
    assert (entry.inputs, entry.outputs) == (cells * 2 * (2 * key + value), cells * 2 * value)
