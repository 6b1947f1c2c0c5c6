"""The convolution of images by Triton's kernels, under its interpreter, against torch in double precision."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from compiling import run_apart
from torch import nn
from torch.nn import functional as F

from paceline.models.blocks import ConvUnit
from paceline.models.fusion import fuse
from paceline.models.registry import build_model
from paceline.models.stem import StemConvolution

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import ModuleType


OF_KERNELS = ("moment_kernels", "norm_kernels", "stem_kernels", "fused_stem")


@pytest.fixture(scope="module")
def kernels(operations: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[ModuleType]:
    """Return the module that launches the kernels, which Triton's interpreter runs."""
    with operations(*OF_KERNELS) as module:
        yield module


def launches(kernels: ModuleType, *, filters: int = 32) -> dict[str, Any]:
    """Return small tiles, of unlike sizes and numbers of parts, with loads of two and three turns under way."""
    forward = kernels.Launch(groups=16, filters=filters, warps=4, stages=2, programs=6)
    return {"forward": forward, "backward": kernels.Launch(groups=32, filters=16, warps=4, stages=3, programs=4)}


class Case:
    """Images, the filters that they are convolved with, and the gradient of the result."""

    def __init__(
        self, shape: tuple[int, int, int], filters: int, stride: int, dtype: torch.dtype = torch.float32
    ) -> None:
        images, height, width = shape
        torch.manual_seed(sum(shape) + filters + stride)
        self.stride, self.dtype = stride, dtype
        x = torch.rand(images, 3, height, width).to(dtype)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.weight = torch.randn(filters, 3, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
        self.of_y = torch.randn(images, filters, (height - 1) // stride + 1, (width - 1) // stride + 1).to(dtype)

    def by_kernels(self, kernels: ModuleType, **launch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y and the gradient of the weight."""
        launch = launch or launches(kernels)
        y = kernels.convolved(self.x, self.weight, stride=self.stride, dtype=self.dtype, **launch)
        return y.detach(), torch.autograd.grad(y, self.weight, self.of_y)[0]

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute by torch, in double, of what is rounded to the type that is computed in."""
        weight = self.weight.detach().to(self.dtype).double().requires_grad_()
        y = F.conv2d(self.x.to(self.dtype).double(), weight, stride=self.stride, padding=1)
        return y.detach(), torch.autograd.grad(y, weight, self.of_y.double())[0]


def differ(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest number."""
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max() / expected.abs().max())


SHAPES = [
    pytest.param((2, 16, 24), id="plain"),
    pytest.param((1, 32, 8), id="one group to a line"),
    pytest.param((2, 13, 19), id="odd height and width"),
    pytest.param((1, 10, 22), id="width that is even alone"),
    pytest.param((3, 7, 40), id="odd height alone"),
    pytest.param((1, 1, 1), id="one pixel"),
    pytest.param((1, 2, 3), id="fewer pixels than a window"),
    pytest.param((5, 1, 9), id="one line"),
    pytest.param((2, 9, 1), id="one column"),
]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_single_precision_is_double_up_to_rounding(
    kernels: ModuleType, shape: tuple[int, int, int], stride: int
) -> None:
    case = Case(shape, 16, stride)
    y, of_weight = case.by_kernels(kernels)
    expected, of_weight_expected = case.expected()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert differ(y, expected) < 1e-6
    assert differ(of_weight, of_weight_expected) < 2e-6


@pytest.mark.parametrize("filters", [8, 16, 24, 64, 80, 96])
def test_filters_come_in_blocks_of_what_divides_their_number(kernels: ModuleType, filters: int) -> None:
    case = Case((2, 12, 16), filters, 2)
    y, of_weight = case.by_kernels(kernels, **launches(kernels, filters=64))
    expected, of_weight_expected = case.expected()
    assert differ(y, expected) < 1e-6
    assert differ(of_weight, of_weight_expected) < 2e-6


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_at_the_end_alone(kernels: ModuleType, dtype: torch.dtype, stride: int) -> None:
    case = Case((2, 16, 24), 16, stride, dtype)
    y, of_weight = case.by_kernels(kernels)
    expected, of_weight_expected = case.expected()
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert differ(of_weight, of_weight_expected) < 2e-6  # of sums nothing is lost
    assert y.dtype == dtype
    assert of_weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_in_single_precision_are_rounded_on_the_way(kernels: ModuleType, dtype: torch.dtype) -> None:
    case = Case((2, 12, 16), 16, 2, dtype)
    case.x = torch.rand_like(case.x, dtype=torch.float32)
    y, of_weight = case.by_kernels(kernels)
    case.x = case.x.to(dtype)
    same, same_of_weight = case.by_kernels(kernels)
    assert torch.equal(y, same)
    assert torch.equal(of_weight, same_of_weight)


@pytest.mark.parametrize("first", [0, 3, 8])
def test_a_gradient_that_is_part_of_a_wider_map_is_read_where_it_lies(kernels: ModuleType, first: int) -> None:
    case = Case((2, 13, 19), 16, 2)
    wide = torch.full((2, 28, *case.of_y.shape[2:]), float("nan")).contiguous(memory_format=torch.channels_last)
    wide[:, first : first + 16] = case.of_y
    case.of_y = wide[:, first : first + 16]
    _, of_weight = case.by_kernels(kernels)
    assert differ(of_weight, case.expected()[1]) < 2e-6


def test_a_gradient_may_lie_anyhow(kernels: ModuleType) -> None:
    case = Case((2, 12, 16), 16, 2)
    case.of_y = case.of_y.contiguous()
    assert differ(case.by_kernels(kernels)[1], case.expected()[1]) < 2e-6
    case.of_y = torch.ones(1).expand_as(case.of_y)
    assert differ(case.by_kernels(kernels)[1], case.expected()[1]) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_is_laid_out_as_the_weight_and_of_its_type(
    kernels: ModuleType, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    case = Case((2, 12, 16), 16, 2, torch.bfloat16)
    case.weight = case.weight.detach().to(dtype).contiguous(memory_format=layout).requires_grad_()
    _, of_weight = case.by_kernels(kernels)
    assert of_weight.stride() == case.weight.stride()
    assert of_weight.dtype == dtype
    assert differ(of_weight, case.expected()[1]) < (2e-6 if dtype is torch.float32 else torch.finfo(dtype).eps)


def test_what_lies_beside_images_and_gradients_is_never_read(kernels: ModuleType) -> None:
    """Memory before, between and after the numbers is NaN, and a mask that let one through would show it."""
    for shape, stride in (((2, 13, 19), 2), ((2, 12, 16), 2), ((1, 5, 6), 1)):
        case = Case(shape, 8, stride)
        for name in ("x", "of_y"):
            values = getattr(case, name).contiguous(memory_format=torch.channels_last)
            room = torch.full((values.numel() + 512,), float("nan"))
            place = room[256:-256].view(len(values), *values.shape[2:], values.shape[1]).permute(0, 3, 1, 2)
            setattr(case, name, place.copy_(values))
        y, of_weight = case.by_kernels(kernels)
        expected, of_weight_expected = case.expected()
        assert differ(y, expected) < 1e-6
        assert differ(of_weight, of_weight_expected) < 2e-6


def test_parts_change_rounding_alone_and_the_same_ones_nothing(kernels: ModuleType) -> None:
    case = Case((3, 16, 40), 16, 2)
    y, of_weight = case.by_kernels(kernels)
    again, of_weight_again = case.by_kernels(kernels)
    assert torch.equal(y, again)
    assert torch.equal(of_weight, of_weight_again)
    one = kernels.Launch(groups=64, filters=8, warps=4, stages=1, programs=1)
    y_of_one, of_weight_of_one = case.by_kernels(kernels, forward=one, backward=one)
    assert torch.equal(y, y_of_one)
    assert differ(of_weight, of_weight_of_one.double()) < 1e-6


def test_an_image_is_convolved_as_in_a_batch(kernels: ModuleType) -> None:
    case = Case((3, 14, 18), 16, 2)
    together, _ = case.by_kernels(kernels)
    whole, gradient = case.x, case.of_y
    for number in range(3):
        case.x, case.of_y = whole[number : number + 1], gradient[number : number + 1]
        assert torch.equal(case.by_kernels(kernels)[0], together[number : number + 1])


def wanted(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType, *, there: bool = True) -> list[torch.dtype]:
    """Let stems believe that this device has kernels, or has none; note the types that these shall compute in."""
    monkeypatch.setattr(StemConvolution, "_has_stem_kernels", lambda stem, x: there)
    types: list[torch.dtype] = []
    taken = kernels.convolved

    def noted(*arguments: Any, dtype: torch.dtype, **named: Any) -> torch.Tensor:
        types.append(dtype)
        result: torch.Tensor = taken(*arguments, dtype=dtype, **named, **launches(kernels))
        return result

    monkeypatch.setattr(kernels, "convolved", noted)
    return types


def images(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.rand(shape).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("of_images", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_autocast", [None, torch.bfloat16, torch.float16])
def test_types_are_those_of_torch(
    kernels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    of_images: torch.dtype,
    of_weight: torch.dtype,
    of_autocast: torch.dtype | None,
) -> None:
    types = wanted(monkeypatch, kernels)
    stem = StemConvolution(3, 16, 3, 2).to(of_weight)
    x = images(2, 3, 12, 16, dtype=of_images)
    plain = nn.Conv2d.forward

    def convolve(forward: Callable[..., torch.Tensor]) -> tuple[torch.dtype, torch.Tensor] | type[Exception]:
        stem.weight.grad = None
        try:
            with torch.autocast("cpu", dtype=of_autocast, enabled=of_autocast is not None):
                y = forward(stem, x)
        except RuntimeError as error:
            return type(error)
        y.sum().backward()
        assert stem.weight.grad is not None
        assert stem.weight.grad.dtype == of_weight
        return y.dtype, torch.cat((y.detach().flatten().float(), stem.weight.grad.flatten().float() / 100))

    found, expected = convolve(StemConvolution.forward), convolve(plain)
    if isinstance(expected, type):
        assert found is expected
        return
    assert not isinstance(found, type)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=2e-2, atol=2e-2)
    assert types == ([expected[0]] if expected[0] != torch.float32 else [])


def test_all_else_is_left_to_torch(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    types = wanted(monkeypatch, kernels)

    def stem(in_channels: int = 3, out_channels: int = 16, kernel: int = 3, stride: int = 2, **more: int) -> nn.Conv2d:
        return StemConvolution(in_channels, out_channels, kernel, stride, **more).to(torch.bfloat16)

    x = images(2, 3, 12, 16)
    with_bias = stem()
    with_bias.bias = nn.Parameter(torch.zeros(16, dtype=torch.bfloat16))
    unlike = [
        (stem(6), images(2, 6, 12, 16)),
        (stem(out_channels=20), x),
        (stem(kernel=5), x),
        (stem(stride=3), x),
        (stem(out_channels=24, groups=3), x),
        (with_bias, x),
        (stem(), x.contiguous()),
        (stem(), x[:, :, :, ::2]),
        (stem(), x[0]),
        (stem(), images(0, 3, 12, 16)),
        (stem(), images(2, 3, 12, 16).requires_grad_()),
        (stem().double(), x.double()),
        (stem().requires_grad_(False), x),
    ]
    for module, values in unlike:
        module(values)
        assert types == [], module
    with torch.no_grad():
        stem()(x)
    assert types == []
    stem()(x)
    assert types == [torch.bfloat16]
    wanted(monkeypatch, kernels, there=False)
    stem()(x)
    assert types == [torch.bfloat16]


def test_a_device_without_kernels_has_none() -> None:
    stem = StemConvolution(3, 16, 3, 2)
    assert not stem._has_stem_kernels(images(1, 3, 8, 8))
    assert not stem._has_stem_kernels(images(1, 3, 8, 8).to("meta"))


def test_networks_begin_with_a_stem_under_the_same_key() -> None:
    for name in ("yolov8n", "yolo11n"):
        network = build_model(name, 3)
        stems = [key for key, module in network.named_modules() if isinstance(module, StemConvolution)]
        assert len(stems) == 1
        assert cast("StemConvolution", network.get_submodule(stems[0]))._fits()
        assert next(iter(network.state_dict())) == f"{stems[0]}.weight"
    for unlike in (ConvUnit(16, 16, 3), ConvUnit(3, 16, 1), ConvUnit(3, 15, 3, groups=3)):
        assert not (isinstance(unlike.conv, StemConvolution) and unlike.conv._fits())


def test_a_unit_learns_the_same_by_kernels_and_fuses(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(2, 3, 12, 16, dtype=torch.float32)
    found = []
    for there in (True, False):
        torch.manual_seed(0)
        types = wanted(monkeypatch, kernels, there=there)
        unit = copy.deepcopy(ConvUnit(3, 16, 3, 2).to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            unit(x).float().square().sum().backward()
        found.append([value.grad for value in unit.parameters()])
        whole = unit.eval()(x)
        torch.testing.assert_close(fuse(unit)(x), whole, rtol=1e-4, atol=1e-4)
        assert len(types) == there, "only the step in bfloat16 went by kernels"
        monkeypatch.undo()
    for one, other in zip(*found, strict=True):
        assert differ(one, other.double()) < 2e-2


@pytest.mark.parametrize("autocast", [True, False])
def test_a_compiled_stem_is_left_to_the_compiler(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> None:
    types = wanted(monkeypatch, kernels)
    stem, x = StemConvolution(3, 16, 3, 2).to(torch.bfloat16), images(1, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert torch.equal(torch.compile(stem, backend="eager", fullgraph=True)(x), nn.Conv2d.forward(stem, x))
        assert types == []
        stem(x)
    assert types == [torch.bfloat16]


_PROGRAM = """
from compiling import compiled, usage_of

from paceline.models.operations import stem_kernels
from paceline.models.operations.fused_stem import BACKWARD, FORWARD, NORMED, SETTLED_ROWS, SETTLED_WEIGHTS
from paceline.models.operations.fused_stem import multiplying_warps_of, warps_of

plain, norm = dict(silu=False, ptx=True), dict(silu=True, ptx=True)
SHARED_MEMORY = 99 * 1024  # of a program, on the least of the devices that run kernels


def made(kernel, fixed, warps, *, of_images="*bf16", computed="*bf16", capability=90):
    kinds = dict(x=of_images, bands=computed, y=computed, of_y=computed)
    kinds |= dict.fromkeys(("weight", "parts", "of_weight", "moments", "kept"), "*fp32")
    kinds |= dict.fromkeys(("affine_weight", "affine_bias", "of_affine"), "*fp32")
    result = compiled(kernel, fixed, kinds, warps=warps, capability=capability)
    assert result.metadata.shared <= SHARED_MEMORY, (kernel, fixed, result.metadata.shared)
    assert not usage_of(result).spilled, (kernel, fixed)
    return result.asm["ptx"]


def of(launch, filters, **more):
    sizes = dict(stride=2, groups=launch.groups, channels=min(filters, launch.filters), step=8, whole=True)
    return sizes | dict(stages=launch.stages) | more


def convolve(filters, notes, more={}, **kinds):
    warps = warps_of(FORWARD, min(filters, FORWARD.filters), notes=notes, even=not more)
    return made(stem_kernels._convolve, of(FORWARD, filters, notes=notes, ptx=True, **more), warps, **kinds)


for filters in (8, 16, 32, 64):
    for notes in (False, True)[filters != 32 :]:
        ptx = convolve(filters, notes)
        assert "wgmma" in ptx
        assert "st.global.v4.b32" in ptx
        assert "st.global.b16" not in ptx, "eight numbers are stored at once"
        assert "cp.async.cg.shared.global" in ptx, "and as many loaded, ahead"
        assert "cp.async.ca" not in ptx
    ptx = made(stem_kernels._multiply, of(BACKWARD, filters, of_y_step=8, normed=False, **plain), BACKWARD.warps)
    assert "cp.async.cg.shared.global" in ptx
    assert "cp.async.ca" not in ptx
    if filters > 8:  # which are too few for the widest instructions
        assert "wgmma" in ptx
        assert "ld.global" not in ptx
    ptx = made(stem_kernels._multiply, of(NORMED, filters, of_y_step=8, normed=True, **norm), NORMED.warps)
    assert ptx.count("cp.async.cg.shared.global") > 3, "images, y and the gradient of z are loaded ahead"
    assert "cp.async.ca" not in ptx
for kinds in (dict(of_images="*fp32"), dict(capability=80), dict(of_images="*fp16", computed="*fp16", capability=89)):
    convolve(32, True, **kinds)
    made(stem_kernels._multiply, of(BACKWARD, 32, of_y_step=8, normed=False, **plain), BACKWARD.warps, **kinds)
    made(stem_kernels._multiply, of(NORMED, 32, of_y_step=8, normed=True, **norm), NORMED.warps, **kinds)
for more in (dict(step=1), dict(whole=False), dict(stride=1, step=1, whole=False)):
    convolve(16, True, more)
    made(stem_kernels._multiply, of(BACKWARD, 16, of_y_step=1, normed=False, **plain, **more), BACKWARD.warps)
    warps = multiplying_warps_of(NORMED, normed=True, even=False)
    made(stem_kernels._multiply, of(NORMED, 16, of_y_step=1, normed=True, **norm, **more), warps)
made(stem_kernels._spread, dict(stride=2, channels=16), 4)
made(stem_kernels._settle, dict(rows=SETTLED_ROWS, weights=SETTLED_WEIGHTS), 8)
print("compiled")
"""


def test_the_kernels_compile_for_hopper_and_older(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_apart(_PROGRAM, tmp_path) == "compiled"
