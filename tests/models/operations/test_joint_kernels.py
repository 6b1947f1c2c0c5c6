"""Convolutions over several maps by Triton's kernels, under its interpreter, against torch in double precision."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from compiling import run_apart
from torch import nn
from torch.nn import functional as F

from paceline.models import blocks, joint
from paceline.models.blocks import C2PSA, SPPF, C2f, C3k2, ConvUnit
from paceline.models.fusion import fuse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import ModuleType

    from torch import Tensor

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels(operations: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[ModuleType]:
    """Return the module that launches the kernels, which Triton's interpreter runs."""
    with (
        operations("moment_kernels", "part_kernels", "joint_kernels", "fused_joint") as module,
        pytest.MonkeyPatch.context() as patch,
    ):
        _multiply_bfloat16(patch)
        yield module


def _multiply_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply matrices of bfloat16, whose bits it takes for whole numbers."""
    from triton import language as tl
    from triton.runtime import interpreter

    of_others = interpreter.InterpreterBuilder.create_dot

    def widened(values: Any) -> Any:
        if values.dtype.scalar != tl.bfloat16:
            return values
        numbers = (values.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(numbers, tl.float32)

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return of_others(builder, widened(a), widened(b), *rest)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


class Case:
    """Maps of these widths, and what they are convolved with."""

    def __init__(
        self, widths: Sequence[int], out_channels: int, dtype: torch.dtype, *, size: tuple[int, int, int] = (2, 5, 7)
    ) -> None:
        torch.manual_seed(sum(widths) + out_channels)
        images, height, width = size
        maps = [torch.randn(images, channels, height, width).to(dtype) for channels in widths]
        self.dtype = dtype
        self.maps = [values.contiguous(memory_format=torch.channels_last).requires_grad_() for values in maps]
        self.weight = (torch.randn(out_channels, sum(widths), 1, 1) / sum(widths) ** 0.5).requires_grad_()
        self.of_y = torch.randn(images, out_channels, height, width).to(dtype)

    def check(self, y: Tensor, maps: Sequence[Tensor] | None = None) -> None:
        """Go backward, and compare everything with torch in double."""
        maps = self.maps if maps is None else maps
        y.backward(self.of_y)
        exact = [values.detach().double().requires_grad_() for values in maps]
        weight = self.weight.detach().to(self.dtype).double().requires_grad_()
        expected = F.conv2d(torch.cat(exact, dim=1), weight)
        expected.backward(self.of_y.double())
        bound = torch.finfo(self.dtype).eps  # rounded once, at the end
        assert y.dtype == self.dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.detach().double(), expected.detach(), rtol=bound, atol=1e-5)
        for values, right in zip(maps, exact, strict=True):
            assert values.grad is not None
            assert values.grad.dtype == values.dtype
            torch.testing.assert_close(values.grad.double(), right.grad, rtol=bound, atol=1e-5)
        assert self.weight.grad is not None
        assert self.weight.grad.dtype == torch.float32
        torch.testing.assert_close(self.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-4)


def small(kernels: ModuleType, rows: int = 16, columns: int = 16, depth: int = 16, stages: int = 2) -> Any:
    """Return tiles that are smaller than what is computed, and many parts of the sum over cells."""
    tile = kernels.Tile(rows=rows, columns=columns, depth=depth, warps=4, stages=stages)
    return kernels.Tiles(of_result=tile, of_pieces=tile, of_weight=tile)


WIDTHS = [
    pytest.param((8, 16, 24, 80), id="uneven"),
    pytest.param((16, 16, 16), id="even"),
    pytest.param((40,), id="one"),
    pytest.param((8,) * 8, id="as many as there is room for"),
    pytest.param((8, 16) + (8,) * 8, id="more than there is room for"),
    pytest.param((104, 8), id="wider than a tile"),
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("widths", WIDTHS)
def test_maps_are_convolved_as_if_they_were_joined(
    kernels: ModuleType, widths: tuple[int, ...], dtype: torch.dtype
) -> None:
    for tiles in (kernels.CHOSEN, small(kernels)):
        case = Case(widths, 40, dtype)
        case.check(kernels.convolved(case.weight, case.maps, dtype, tiles=tiles))


@pytest.mark.parametrize("out_channels", [8, 80, 200])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 16, 8), (3, 19, 17)], ids=str)
def test_tiles_may_be_partly_filled(kernels: ModuleType, size: tuple[int, int, int], out_channels: int) -> None:
    case = Case((24, 48), out_channels, torch.float16, size=size)
    case.check(kernels.convolved(case.weight, case.maps, torch.float16))


def test_sums_over_many_cells_are_cut_into_parts(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SETTLED_PARTS", 4)
    monkeypatch.setattr(kernels, "_LEAST_TURNS", 1)
    case = Case((8, 16), 24, torch.bfloat16, size=(1, 19, 17))
    case.check(kernels.convolved(case.weight, case.maps, torch.bfloat16, tiles=small(kernels)))
    again = Case((8, 16), 24, torch.bfloat16, size=(1, 19, 17))
    kernels.convolved(again.weight, again.maps, torch.bfloat16, tiles=small(kernels)).backward(again.of_y)
    assert again.weight.grad is not None
    assert torch.equal(again.weight.grad, case.weight.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [0, 3, 8])
def test_maps_and_gradients_may_be_slices_of_wider_maps(kernels: ModuleType, first: int) -> None:
    """Those that begin between two loads are copied; what lies beside a slice is never used."""
    case = Case((16, 24), 32, torch.bfloat16)

    def slice_of(values: Tensor) -> Tensor:
        images, channels, height, width = values.shape
        wide = torch.full((images, channels + 16, height, width), float("nan"), dtype=values.dtype)
        wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, first : first + channels] = values.detach()
        return wide[:, first : first + channels]

    maps = [slice_of(values).requires_grad_() for values in case.maps]
    case.of_y = slice_of(case.of_y)
    lie_well: list[bool] = []
    for values in maps:
        values.register_hook(lambda found: lie_well.append(found.is_contiguous(memory_format=torch.channels_last)))
    case.check(kernels.convolved(case.weight, maps, torch.bfloat16), maps)
    assert lie_well == [True, True]


def test_maps_in_rows_of_channels_are_copied_first(kernels: ModuleType) -> None:
    case = Case((16, 24), 32, torch.float16)
    maps = [values.detach().contiguous().requires_grad_() for values in case.maps]
    case.of_y = case.of_y[:, :, :, :1].expand_as(case.of_y)  # not channels-last, nor in memory at all
    case.check(kernels.convolved(case.weight, maps, torch.float16), maps)


def test_maps_of_another_type_are_rounded_as_autocast_does(kernels: ModuleType) -> None:
    case = Case((16, 24), 32, torch.bfloat16)
    maps = [values.detach().float().requires_grad_() for values in case.maps]
    y = kernels.convolved(case.weight, maps, torch.bfloat16)
    y.backward(case.of_y)
    assert [values.grad.dtype for values in maps] == [torch.float32] * 2  # type: ignore[union-attr]
    right = Case((16, 24), 32, torch.bfloat16)
    assert torch.equal(y, kernels.convolved(right.weight, right.maps, torch.bfloat16))


def test_only_gradients_that_somebody_needs_are_computed(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((16, 24), 32, torch.float16)
    case.weight.requires_grad_(False)
    case.maps[0].requires_grad_(False)
    kernels.convolved(case.weight, case.maps, torch.float16).backward(case.of_y)
    assert case.weight.grad is None
    assert case.maps[0].grad is None
    assert case.maps[1].grad is not None

    frozen = Case((16, 24), 32, torch.float16)
    for values in frozen.maps:
        values.requires_grad_(False)
    y = kernels.convolved(frozen.weight, frozen.maps, torch.float16)
    monkeypatch.setattr(kernels, "_piece_gradients", None)
    y.backward(frozen.of_y)
    assert frozen.weight.grad is not None


class Small(nn.Module):
    """Every block that joins maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ConvUnit(3, 16, 3, 2)
        self.blocks = nn.Sequential(
            C3k2(16, 16, 1, c3k=False, ratio=0.5),
            C2f(16, 32, 3, residual=True),
            C3k2(32, 32, 1, c3k=True),
            SPPF(32, 32),
            C2PSA(32, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """B3HW to B32."""
        pooled: Tensor = self.blocks(self.first(x)).mean((2, 3))
        return pooled


JOINS = [3, 5, 2, 3, 2]
"""How many maps each join in `Small` takes: one of each block, and within the second C3k2 one of its C3k."""


def network() -> Small:
    torch.manual_seed(0)
    return Small().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload,no-any-return]


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The output of a network, its gradients and its state afterwards."""
    torch.manual_seed(1)
    images = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = model(images)
    output.square().sum().backward()
    assert images.grad is not None
    found = {"output": output.detach(), "images": images.grad}
    found |= {f"gradient of {name}": value.grad for name, value in model.named_parameters() if value.grad is not None}
    return found | model.state_dict()


@pytest.fixture
def calls(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let networks on the CPU go by kernels, in single precision too; how many maps each convolution took."""
    found: list[int] = []
    taken = kernels.convolved

    def counted(weight: Tensor, pieces: Sequence[Tensor], dtype: torch.dtype, **named: Any) -> Tensor:
        found.append(len(pieces))
        result: Tensor = taken(weight, pieces, dtype, **named)
        return result

    monkeypatch.setattr(kernels, "convolved", counted)
    monkeypatch.setattr(joint, "usable", lambda device: device.type == "cpu")
    monkeypatch.setattr(joint, "TYPES", joint.TYPES | {torch.float32})
    return found


def test_a_network_is_the_same_by_kernels(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    found = trained(model)
    assert calls == JOINS
    twin = copy.deepcopy(model)
    monkeypatch.setattr(joint, "TYPES", frozenset())
    expected = trained(network())
    assert calls == JOINS
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bound = 1e-5 + 1e-4 * float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=bound, msg=name)

    monkeypatch.undo()  # evaluation, copies and fused networks know nothing of it
    images = torch.rand(2, 3, 16, 16)
    answer = model.eval()(images)
    assert torch.equal(twin.eval()(images), answer)
    torch.testing.assert_close(fuse(model)(images), answer, rtol=1e-4, atol=1e-5)


def test_without_kernels_maps_are_joined_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as of a join and a convolution."""
    found = trained(network())
    monkeypatch.setattr(blocks, "convolved_jointly", lambda convolution, maps, *_: convolution(torch.cat(maps, dim=1)))
    for name, value in trained(network()).items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", HALVES)
def test_under_autocast_it_is_computed_in_its_type(calls: list[int], dtype: torch.dtype) -> None:
    unit = ConvUnit(24, 16).train()
    maps = [torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    with torch.autocast("cpu", dtype):
        assert joint.type_for_kernels(unit.conv, maps) == dtype
        y = unit.joined(*maps)
        right = unit(torch.cat(maps, dim=1))
    assert calls == [3]
    torch.testing.assert_close(y, right, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    y.float().square().sum().backward()
    assert unit.conv.weight.grad is not None
    assert unit.conv.weight.grad.dtype == torch.float32


def _maps(*widths: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.zeros(2, width, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last) for width in widths]


def _conv(in_channels: int = 24, out_channels: int = 16, *more: int, **named: Any) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, *more or (1,), **({"bias": False} | named)).bfloat16()


class Doubling(nn.Conv2d):
    """A convolution that is more than one."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice what it would give."""
        y: Tensor = 2 * super().forward(x)
        return y


def _own() -> nn.Conv2d:
    return Doubling(24, 16, 1, bias=False).bfloat16()


def _normed() -> nn.Conv2d:
    found: nn.Conv2d = nn.utils.parametrizations.weight_norm(_conv())
    return found


def _hooked(register: str) -> nn.Conv2d:
    convolution = _conv()
    getattr(convolution, register)(lambda *_: None)
    return convolution


LEFT_TO_TORCH = [
    pytest.param(_conv(24, 16, 3), _maps(8, 16), id="kernel"),
    pytest.param(_conv(24, 16, 1, 2), _maps(8, 16), id="stride"),
    pytest.param(_conv(24, 16, padding=1), _maps(8, 16), id="padding"),
    pytest.param(_conv(24, 16, groups=2), _maps(8, 16), id="groups"),
    pytest.param(_conv(24, 16, bias=True), _maps(8, 16), id="bias"),
    pytest.param(_conv(24, 20), _maps(8, 16), id="channels"),
    pytest.param(_conv(24, 16), _maps(12, 12), id="widths"),
    pytest.param(_conv(24, 16), [values.contiguous() for values in _maps(8, 16)], id="layout"),
    pytest.param(_conv(24, 16), [values[:0] for values in _maps(8, 16)], id="no image"),
    pytest.param(_conv(24, 16), _maps(8, 16, dtype=torch.float16), id="two types"),
    pytest.param(_conv(24, 16).float(), _maps(8, 16, dtype=torch.float32), id="single precision"),
    pytest.param(_conv(24, 16).eval(), _maps(8, 16), id="evaluation"),
    pytest.param(_own(), _maps(8, 16), id="somebody's own"),
    pytest.param(_normed(), _maps(8, 16), id="parametrised"),
    *(
        pytest.param(_hooked(f"register_{kind}"), _maps(8, 16), id=kind)
        for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    ),
]


@pytest.mark.parametrize(("convolution", "maps"), LEFT_TO_TORCH)
def test_the_rest_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, convolution: nn.Conv2d, maps: list[Tensor]) -> None:
    assert joint.type_for_kernels(_conv(), _maps(8, 16)) is None, "this is a CPU"
    monkeypatch.setattr(joint, "usable", lambda device: True)
    assert joint.type_for_kernels(_conv(), _maps(8, 16)) == torch.bfloat16
    with torch.no_grad():
        assert joint.type_for_kernels(_conv(), _maps(8, 16)) is None
    assert joint.type_for_kernels(convolution, maps) is None


def test_a_convolution_of_somebodys_own_is_asked_about_several_maps(calls: list[int]) -> None:
    unit = ConvUnit(24, 16).bfloat16().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    maps = [values + 1 for values in _maps(8, 16)]
    y = joint.convolved_jointly(unit.conv, maps)
    own = _own()
    own.weight = unit.conv.weight
    torch.testing.assert_close(joint.convolved_jointly(own, maps), 2 * y, rtol=0.02, atol=0.02)
    assert calls == [2]


def test_a_compiled_step_joins(calls: list[int]) -> None:
    """The compiler has a kernel of its own for a join, and none for what it cannot see into."""
    unit = ConvUnit(24, 16).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    maps = _maps(8, 16, dtype=torch.float32)
    torch.compile(unit.joined, backend="eager", fullgraph=True)(*maps)
    assert calls == []
    unit.joined(*maps)
    assert calls == [2]


_PROGRAM = """
import re

from compiling import compiled, usage_of

from paceline.models.operations import joint_kernels, part_kernels
from paceline.models.operations.fused_joint import Tile, tile_of_map, tile_of_weight

floats = dict.fromkeys(("parts", "of_weight", "moments"), "*fp32")


KERNELS = vars(joint_kernels) | vars(part_kernels)


def built(kernel, fixed, warps, kind, capability=90):
    room = fixed.get("room", 0)
    kinds = dict.fromkeys(("weight", "y", "of_y"), kind) | floats
    kinds |= {"pieces": (kind,) * room, "pitches": ("i32",) * room, "ends": ("i32",) * room}
    return compiled(kernel, fixed, kinds, warps=warps, capability=capability)


sizes = [(64, 48, 4), (128, 96, 8), (192, 384, 1), (256, 192, 4)]
variants = {("_settle_weight", 0, 4, (("at_once", 64), ("weights", 32)))}
for num_out, num_in, room in sizes:
    tiles = {
        "_convolve_joint": tile_of_map(num_out, num_in),
        "_piece_gradients": tile_of_map(num_in, num_out),
        "_weight_parts": tile_of_weight(num_out, num_in),
    }
    for name, tile in tiles.items():
        fixed = {key: value for key, value in vars(tile).items() if key not in ("warps", "programs")}
        more = {"notes": True} if name == "_convolve_joint" else {}  # which takes more than without
        variants.add((name, room, tile.warps, tuple((fixed | more).items())))
for name, room, warps, fixed in sorted(variants):
    made = built(KERNELS[name], dict(fixed) | ({"room": room} if room else {}), warps, "*bf16", 89)
    assert made.metadata.shared <= 99 * 1024, "what consumer cards have"
for number, (name, room, warps, fixed) in enumerate(sorted(variants)):
    fixed = dict(fixed) | ({"room": room} if room else {})
    made = built(KERNELS[name], fixed, warps, ("*bf16", "*fp16")[number % 2])
    ptx = made.asm["ptx"]
    if name == "_settle_weight":
        continue
    assert "wgmma.mma_async" in ptx, (name, fixed)
    several = fixed["stages"] > 1
    assert ("cp.async.cg" if several else "ld.global.v4.b32") in ptx, "eight channels are loaded at once"
    narrow = r"(ld\\.global\\.(b16|v2)|cp\\.async\\.ca|st\\.global\\.(b16|v2))"
    assert not re.search(narrow, ptx), (name, fixed, "and never one by one")
    assert not usage_of(made).spilled, (name, fixed)
print("compiled", len(variants))
"""


def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_apart(_PROGRAM, tmp_path).startswith("compiled")
