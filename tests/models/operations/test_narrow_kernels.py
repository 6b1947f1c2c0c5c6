"""Convolutions of few channels by Triton's kernels, under its interpreter, against torch in double precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from compiling import run_apart
from torch.nn import functional as F

from paceline.models.blocks import Bottleneck
from paceline.models.convolution import Convolution
from paceline.models.operations.moments import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import ModuleType


@pytest.fixture(scope="module")
def kernels(operations: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[ModuleType]:
    """Return the module that launches the kernels, which Triton's interpreter runs."""
    with operations("moment_kernels", "part_kernels", "narrow_kernels", "narrow_conv") as module:
        yield module


CASES = [
    pytest.param(2, 16, 8, (9, 7), 1, id="fewer channels"),
    pytest.param(1, 8, 24, (20, 12), 1, id="more channels, several tiles"),
    pytest.param(2, 16, 32, (11, 13), 2, id="stride two, odd sides"),
    pytest.param(3, 32, 16, (8, 18), 2, id="stride two, even sides"),
    pytest.param(1, 32, 64, (3, 5), 1, id="as wide as can be"),
    pytest.param(1, 64, 32, (5, 4), 1, id="only the gradient of the weights is torch's"),
    pytest.param(1, 8, 24, (7, 20), 2, id="stride two, channels that fill no power of two"),
    pytest.param(2, 8, 8, (1, 1), 1, id="one cell"),
    pytest.param(2, 8, 8, (1, 1), 2, id="one cell, stride two"),
    pytest.param(1, 8, 8, (1, 9), 2, id="one line"),
]


def all_of(
    images: int, channels: int, out_channels: int, size: tuple[int, int], stride: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a map, weights, and a gradient of the result."""
    torch.manual_seed(channels + out_channels)
    x = torch.randn(images, channels, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    shape = (images, out_channels, *((side - 1) // stride + 1 for side in size))
    return x, weight, torch.randn(shape).to(dtype)


def differ(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Return the largest difference, as a share of the largest number."""
    assert found is not None
    assert expected is not None
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("images", "channels", "out_channels", "size", "stride"), CASES)
def test_all_three_passes_are_torchs_in_double(
    kernels: ModuleType,
    images: int,
    channels: int,
    out_channels: int,
    size: tuple[int, int],
    stride: int,
    dtype: torch.dtype,
) -> None:
    x, weight, of_y = all_of(images, channels, out_channels, size, stride, dtype)
    assert kernels.is_narrow(channels, out_channels, stride)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    weighing = kernels.Launch(programs=3)
    y = kernels.convolved(*leaves, stride, dtype, weighing=weighing)
    y.backward(of_y)
    exact = x.double().requires_grad_(), weight.to(dtype).double().requires_grad_()
    expected = F.conv2d(*exact, stride=stride, padding=1)
    expected.backward(of_y.double())
    bound = 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == dtype == leaves[0].grad.dtype  # type: ignore[union-attr]
    assert differ(y, expected) < bound
    assert differ(leaves[0].grad, exact[0].grad) < bound
    assert leaves[1].grad.dtype is torch.float32  # type: ignore[union-attr]
    ours = channels <= 32
    assert differ(leaves[1].grad, exact[1].grad) < (1e-6 if ours else bound)  # of sums nothing is lost


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("programs", [1, 40, 10_000])
@pytest.mark.parametrize(("channels", "out_channels"), [(8, 16), (16, 40)])
def test_it_does_not_depend_on_how_maps_are_cut_into_strips(
    kernels: ModuleType, channels: int, out_channels: int, programs: int, stride: int
) -> None:
    """To the bit; the last strips of an image have fewer lines, the last tiles fewer strips and columns."""
    x, weight, _ = all_of(3, channels, out_channels, (45, 27), stride, torch.float32)
    weight = weight.contiguous(memory_format=torch.channels_last)
    launch = kernels.Launch(programs=programs)
    tally = Tally()
    y = kernels._convolved(x, weight, stride, launch, tally=tally)
    assert differ(y, F.conv2d(x.double(), weight.double(), stride=stride, padding=1)) < 1e-6
    assert torch.equal(y, kernels._convolved(x, weight, stride, kernels.Launch(programs=7)))
    assert tally.moments is not None
    mean, variance, count = tally.moments.joined()
    assert int(count) == y.numel() // out_channels
    assert differ(mean, y.double().mean((0, 2, 3))) < 1e-5
    assert differ(variance, y.double().var((0, 2, 3), correction=0)) < 1e-5
    if stride == 2:
        of_y, size = all_of(3, channels, out_channels, (45, 27), 2, torch.float32)[2], (45, 27)
        of_y = of_y.contiguous(memory_format=torch.channels_last)
        found = kernels._traced_back(of_y, weight, size, launch)
        expected = F.conv_transpose2d(of_y.double(), weight.double(), stride=2, padding=1)
        assert differ(found, expected) < 1e-6
        assert torch.equal(found, kernels._traced_back(of_y, weight, size, kernels.Launch(programs=7)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "out_channels"), [(32, 64), (64, 32), (24, 88)])
def test_cell_by_cell_it_is_the_same(kernels: ModuleType, channels: int, out_channels: int, stride: int) -> None:
    x, weight, _ = all_of(2, channels, out_channels, (19, 11), stride, torch.float32)
    weight = weight.contiguous(memory_format=torch.channels_last)
    tally = Tally()
    y = kernels._convolved(x, weight, stride, kernels.Cells(), tally=tally)
    assert differ(y, F.conv2d(x.double(), weight.double(), stride=stride, padding=1)) < 1e-6
    assert torch.equal(y, kernels._convolved(x, weight, stride, kernels.Cells(lines=4, columns=16)))
    assert tally.moments is not None
    mean, variance, count = tally.moments.joined()
    assert int(count) == y.numel() // out_channels
    assert differ(mean, y.double().mean((0, 2, 3))) < 1e-5
    assert differ(variance, y.double().var((0, 2, 3), correction=0)) < 1e-5


def test_moments_of_a_large_mean_keep_their_digits(kernels: ModuleType) -> None:
    x, weight, _ = all_of(2, 8, 16, (20, 12), 1, torch.float32)
    weight[:, :, 1, 1] += 100.0
    tally = Tally()
    x += 50.0
    y = kernels._convolved(x, weight.contiguous(memory_format=torch.channels_last), 1, None, tally=tally).double()
    assert tally.moments is not None
    mean, variance, _ = tally.moments.joined()
    assert differ(variance, y.var((0, 2, 3), correction=0)) < 1e-5
    assert differ(mean, y.mean((0, 2, 3))) < 1e-6


@pytest.mark.parametrize("out_channels", [8, 16, 32, 64])
@pytest.mark.parametrize("size", [(160, 160), (80, 80), (40, 40), (20, 20), (13, 50), (1, 1)])
def test_strips_hold_each_line_once_and_few_lanes_are_idle(
    kernels: ModuleType, size: tuple[int, int], out_channels: int
) -> None:
    height, width = size
    outputs = kernels._outputs_of(out_channels, 1)
    assert outputs * out_channels <= max(32, out_channels)
    for programs in (1, 528):
        cut = kernels._Cut.of(64, size, outputs, kernels.Launch(programs=programs))
        assert (cut.strips_down - 1) * cut.lines < height <= cut.strips_down * cut.lines
        assert cut.tiles_across * cut.columns * outputs >= width
        assert cut.tiles * (64 // cut.columns) >= cut.strips * cut.tiles_across
        if width % 40 == 0:
            assert cut.tiles_across * cut.columns * outputs == width


def test_sums_of_weights_do_not_depend_on_how_they_are_cut_beyond_rounding_and_are_the_same_twice(
    kernels: ModuleType,
) -> None:
    x, _, of_y = all_of(3, 16, 16, (12, 20), 1, torch.float32)
    found = [
        kernels._weighed(x, of_y.contiguous(memory_format=torch.channels_last), 1, launch)
        for launch in (
            kernels.Launch(programs=1),
            kernels.Launch(programs=200),
            kernels.Launch(programs=200),
        )
    ]
    assert differ(found[1], found[0].double()) < 1e-6
    assert torch.equal(found[1], found[2])


def test_numbers_that_do_not_count_are_not_read(kernels: ModuleType) -> None:
    """Beyond an image lie its neighbours: one full of NaN changes nothing in the others."""
    x, weight, _ = all_of(3, 8, 16, (5, 7), 1, torch.float32)
    x[1] = float("nan")
    y = kernels.convolved(x, weight, 1, torch.float32)
    for image in (0, 2):
        alone = kernels.convolved(x[image : image + 1], weight, 1, torch.float32)
        assert torch.equal(y[image], alone[0])
    assert bool(y[1].isnan().all())


def test_a_map_that_needs_no_gradient_gets_none(kernels: ModuleType) -> None:
    x, weight, of_y = all_of(1, 8, 8, (4, 4), 1, torch.float32)
    weight.requires_grad_()
    kernels.convolved(x, weight, 1, torch.float32).backward(of_y)
    assert x.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("channels", "out_channels", "stride", "expected"),
    [
        (16, 8, 1, True),
        (16, 32, 2, True),
        (64, 32, 1, True),
        (32, 64, 1, True),
        (64, 32, 2, False),
        (64, 64, 1, False),
        (12, 16, 1, False),
    ],
)
def test_only_convolutions_of_few_channels_are_ours(
    kernels: ModuleType, channels: int, out_channels: int, stride: int, expected: bool
) -> None:
    assert kernels.is_narrow(channels, out_channels, stride) is expected


def test_channels_that_fill_no_power_of_two_are_taken_for_the_next(kernels: ModuleType) -> None:
    """At stride 2 a program for 24 to 48 channels asks for the 120 KB of 32 to 64; consumer GPUs have 99."""
    assert not kernels._Ours.of(24, 48, 2).forward
    for channels, out_channels, full in ((24, 48, (32, 64)), (24, 24, (32, 32)), (8, 40, (8, 64))):
        assert kernels._Ours.of(channels, out_channels, 2) == kernels._Ours.of(*full, 2)


def trained(monkeypatch: pytest.MonkeyPatch, *, by_kernels: bool) -> dict[str, Any]:
    """Outputs and gradients of a block of small convolutions."""
    torch.manual_seed(0)
    block = Bottleneck(16, 8, residual=True).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    monkeypatch.setattr(Convolution, "_has_kernels", lambda convolution, x, dtype: by_kernels)
    images = torch.rand(2, 16, 10, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    found: dict[str, Any] = {"output": block(images)}
    found["output"].square().sum().backward()
    found |= {name: value.grad for name, value in block.named_parameters()}
    return found | {"images": images.grad} | block.state_dict()


def test_a_block_is_the_same_by_kernels(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    taken = kernels.convolved

    def counted(x: torch.Tensor, weight: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        calls.append(tuple(weight.shape[:2]))
        return taken(x, weight, *others, **named)  # type: ignore[no-any-return]

    monkeypatch.setattr(kernels, "convolved", counted)
    found = trained(monkeypatch, by_kernels=True)
    assert calls == [(8, 16), (16, 8)]
    expected = trained(monkeypatch, by_kernels=False)
    assert len(calls) == 2
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


_PROGRAM = """
from compiling import compiled, usage_of

from paceline.models.operations import narrow_conv, narrow_kernels
from paceline.models.operations.narrow_conv import CONVOLVING, TRACING, TRACING_WIDE, WEIGHING, WEIGHING_IN_LITTLE
from paceline.models.operations.narrow_conv import Cells, _outputs_of, _room

kinds = dict.fromkeys(("x", "weight", "y", "of_y", "of_x"), "*bf16") | dict.fromkeys(("parts", "of_weight"), "*fp32")
kinds |= dict(moments="*fp32")


def made_of(kernel, warps, capability=90, **fixed):
    return compiled(kernel, fixed, kinds, warps=warps, capability=capability)


def checked(kernel, launch, most_spilled=8, shares=True, **fixed):
    # for Hopper, where predicates may be spilled, and, with all that may be asked for, for what consumers have
    made = made_of(kernel, launch.warps, stages=launch.stages, **fixed)
    assert usage_of(made).spilled <= most_spilled
    assert "st.global.v4.b32" in made.asm["ptx"], "eight numbers at once"
    if launch.stages > 1:
        assert "cp.async.cg" in made.asm["ptx"], "what comes next is loaded meanwhile, eight numbers at once"
    if shares:
        assert made_of(kernel, launch.warps, 89, stages=launch.stages, **fixed).metadata.shared <= 99 * 1024
    return made.asm["ptx"]


for channels, out_channels, stride in ((16, 8, 1), (16, 32, 2), (32, 32, 1), (32, 64, 1), (64, 32, 1)):
    sizes = dict(in_channels=channels, out_channels=out_channels)
    outputs = _outputs_of(out_channels, stride)
    rooms = dict(room=_room(4 * channels), out_room=_room(outputs * out_channels), outputs=outputs)
    for turned, notes in ((True, False), (False, True)):
        ways = dict(turned=turned, notes=notes, stride=stride, shares=notes) | sizes
        if stride == 2 or channels * out_channels < narrow_conv._BY_CELLS:
            ptx = checked(narrow_kernels._convolve_narrow, CONVOLVING, rows=CONVOLVING.rows, **ways, **rooms)
        else:
            tile = dict(lines=Cells().lines, columns=Cells().columns, room=channels, out_room=out_channels)
            ptx = checked(narrow_kernels._convolve_cells, Cells(), **ways, **tile)
        assert "wgmma" in ptx, "products of matrices"
    if channels <= 32:
        launch = WEIGHING if channels * out_channels < narrow_conv._WIDE else WEIGHING_IN_LITTLE
        fixed = dict(rows=launch.rows, stride=stride) | sizes | rooms
        checked(narrow_kernels._weight_gradient, launch, 80, **fixed)  # of thousands; eight warps take longer
        made = made_of(narrow_kernels._weight_gradient, WEIGHING.warps, stages=WEIGHING.stages, **fixed)
        assert made.metadata.shared <= narrow_conv._MUCH_SHARED
for channels, out_channels in ((16, 32), (32, 64)):
    launch = TRACING if channels * out_channels < narrow_conv._WIDE else TRACING_WIDE
    sizes = dict(in_channels=channels, out_channels=out_channels, rows=launch.rows)
    checked(narrow_kernels._map_gradient, launch, room=_room(2 * out_channels), in_room=_room(2 * channels), **sizes)
print("compiled")
"""


def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_apart(_PROGRAM, tmp_path) == "compiled"
