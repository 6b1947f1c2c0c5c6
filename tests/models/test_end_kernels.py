"""The ends of heads by Triton's kernels, under its interpreter, against torch in double precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from compiling import run_apart
from torch import nn
from torch.nn import functional as F

from paceline.models import ends
from paceline.models.heads import DetectionHead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import ModuleType

    from torch import Tensor

TYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = ((4, 5), (2, 3), (1, 1))
"""Height and width of each level."""


@pytest.fixture(scope="module")
def kernels(interpreting: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[ModuleType]:
    """Return the module that launches the kernels, which Triton's interpreter runs."""
    triton = pytest.importorskip("triton")
    if triton.__version__ < "3.9" and np.__version__ >= "2.4":  # which no longer takes an array of one for a number
        pytest.skip(f"the interpreter of Triton {triton.__version__} cannot count with NumPy {np.__version__}")
    with interpreting(*(f"paceline.models.{name}" for name in ("part_kernels", "end_kernels", "fused_ends"))) as module:
        yield module


class Case:
    """Levels of these sizes, the last convolution of each, and a gradient of the joined points."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        dtype: torch.dtype,
        *,
        images: int = 2,
        sizes: Sequence[tuple[int, int]] = SIZES,
    ) -> None:
        torch.manual_seed(num_in + num_out)
        maps = [torch.randn(images, num_in, *size).to(dtype) for size in sizes]
        self.dtype, self.cells = dtype, [height * width for height, width in sizes]
        self.maps = [values.contiguous(memory_format=torch.channels_last).requires_grad_() for values in maps]
        self.weights = [(torch.randn(num_out, num_in, 1, 1) / num_in**0.5).requires_grad_() for _ in sizes]
        self.biases = [torch.randn(num_out).requires_grad_() for _ in sizes]
        self.of_joined = torch.randn(images, sum(self.cells), num_out).to(dtype)

    @property
    def leaves(self) -> list[Tensor]:
        """All that has a gradient."""
        return [*self.maps, *self.weights, *self.biases]

    def joined(self, kernels: ModuleType, **named: Any) -> Tensor:
        """Join the points by kernels."""
        room = ends.Room(
            joined=torch.full(self.of_joined.shape, float("nan"), dtype=self.dtype), cells=tuple(self.cells)
        )
        pieces = [
            kernels.ended(values, weight, bias, room.joined, sum(self.cells[:place]), **named)
            for place, (values, weight, bias) in enumerate(zip(self.maps, self.weights, self.biases, strict=True))
        ]
        return ends.joined(room, pieces)

    def check(self, joined: Tensor, of_joined: Tensor | None = None) -> None:
        """Go backward, and compare everything with torch in double."""
        of_joined = self.of_joined if of_joined is None else of_joined
        joined.backward(of_joined)
        exact = [values.detach().double().requires_grad_() for values in self.maps]
        rounded = [weight.detach().to(self.dtype).double().requires_grad_() for weight in self.weights]
        biases = [bias.detach().double().requires_grad_() for bias in self.biases]
        levels = [F.conv2d(*three) for three in zip(exact, rounded, biases, strict=True)]
        expected = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        expected.backward(of_joined.double())
        bound = torch.finfo(self.dtype).eps  # rounded once, at the end
        assert joined.dtype == self.dtype
        assert joined.is_contiguous()
        torch.testing.assert_close(joined.detach().double(), expected.detach(), rtol=bound, atol=1e-5)
        for values, right in zip(self.leaves, [*exact, *rounded, *biases], strict=True):
            assert values.grad is not None
            assert values.grad.dtype == values.dtype
            rounding = bound if values.dim() == 4 and values.dtype == self.dtype else 1e-5
            torch.testing.assert_close(values.grad.double(), right.grad, rtol=max(rounding, 1e-5), atol=1e-4)
        for values in self.maps:
            assert values.grad is not None
            assert values.grad.is_contiguous(memory_format=torch.channels_last)


def small(kernels: ModuleType, **named: int) -> Any:
    """Return tiles that are smaller than what is computed, and many parts of the sum over cells."""
    sizes = {"rows": 16, "columns": 16, "more": 0, "depth": 16, "warps": 4, "stages": 2} | named
    tile = kernels.Tile(**sizes)
    return kernels.Tiles(of_points=tile, of_map=tile, of_weight=tile)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("num_out", [1, 3, 24, 64, 80])
@pytest.mark.parametrize("num_in", [8, 80])
def test_points_are_those_of_torch_in_double(kernels: ModuleType, num_in: int, num_out: int, dtype: torch.dtype) -> None:
    for tiles in (kernels.CHOSEN, small(kernels), small(kernels, columns=32, more=16)):
        case = Case(num_in, num_out, dtype)
        case.check(case.joined(kernels, tiles=tiles))


@pytest.mark.parametrize(("num_in", "num_out"), [(144, 8), (8, 144), (16, 200), (16, 96)])
def test_wide_ones_are_cut_into_blocks(kernels: ModuleType, num_in: int, num_out: int) -> None:
    case = Case(num_in, num_out, torch.float16, images=1)
    case.check(case.joined(kernels))


@pytest.mark.parametrize(
    ("images", "sizes"),
    [
        pytest.param(1, ((1, 1),), id="one point"),
        pytest.param(3, ((1, 1), (1, 1)), id="levels of one"),
        pytest.param(1, ((9, 17), (5, 8), (3, 4), (1, 2)), id="four levels"),
        pytest.param(3, ((13, 11), (1, 7)), id="odd"),
    ],
)
def test_levels_are_of_any_size(kernels: ModuleType, images: int, sizes: tuple[tuple[int, int], ...]) -> None:
    for num_out in (3, 16):
        case = Case(16, num_out, torch.bfloat16, images=images, sizes=sizes)
        case.check(case.joined(kernels))


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda values: values[:1, :1].expand_as(values),
    "by channels": lambda values: values.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": lambda values: values.repeat_interleave(2, dim=1)[:, ::2],
    "a slice of wider ones": lambda values: F.pad(values, (8, 16), value=float("nan"))[:, :, 8:-16],
    "a slice at an odd place": lambda values: F.pad(values, (3, 1), value=float("nan"))[:, :, 3:-1],
}


@pytest.mark.parametrize("layout", list(GRADIENTS))
@pytest.mark.parametrize("num_out", [3, 16])
def test_gradients_may_lie_anyhow(kernels: ModuleType, layout: str, num_out: int) -> None:
    case = Case(8, num_out, torch.float16)
    case.check(case.joined(kernels), GRADIENTS[layout](case.of_joined))


def test_gradients_are_read_where_they_lie(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    start = kernels.start_kernel

    def noted(kernel: Any, grid: Any, given: Tensor, *rest: Any, **options: Any) -> None:
        if kernel.fn.__name__ == "_end_parts" or options.get("turned"):
            read.append(given.data_ptr())
        start(kernel, grid, given, *rest, **options)

    monkeypatch.setattr(kernels, "start_kernel", noted)
    case = Case(8, 16, torch.bfloat16)
    case.check(case.joined(kernels))
    places = [case.of_joined[:, sum(case.cells[:place]) :].data_ptr() for place in range(len(case.cells))]
    assert sorted(read) == sorted(2 * places)


def test_maps_in_rows_of_channels_are_copied_first(kernels: ModuleType) -> None:
    case = Case(16, 24, torch.float16)
    leaves = case.maps
    case.maps = [values.detach().contiguous().requires_grad_() for values in leaves]
    joined = case.joined(kernels)
    joined.backward(case.of_joined)
    right = Case(16, 24, torch.float16)
    right.check(right.joined(kernels))
    for values, expected in zip(case.leaves, right.leaves, strict=True):
        assert torch.equal(values.grad, expected.grad)  # type: ignore[arg-type]


def test_sums_over_many_cells_are_cut_into_parts_and_added_in_one_order(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_SETTLED_PARTS", 4)
    monkeypatch.setattr(kernels, "_LEAST_TURNS", 1)
    found = []
    for _ in range(2):
        case = Case(24, 20, torch.bfloat16, sizes=((19, 17), (9, 8)))
        case.check(case.joined(kernels, tiles=small(kernels)))
        found.append([values.grad for values in case.leaves])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", ["maps", "weights", "biases"])
def test_only_gradients_that_somebody_needs_are_computed(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, frozen: str
) -> None:
    case = Case(8, 16, torch.float16)
    kinds = {"maps": case.maps, "weights": case.weights, "biases": case.biases}
    for values in kinds[frozen]:
        values.requires_grad_(False)
    started: list[str] = []
    start = kernels.start_kernel
    monkeypatch.setattr(
        kernels,
        "start_kernel",
        lambda kernel, *given, **named: (started.append(kernel.fn.__name__), start(kernel, *given, **named)),
    )
    case.joined(kernels).backward(case.of_joined)
    assert {name for name, them in kinds.items() if them[0].grad is None} == {frozen}
    assert started.count("_multiply_end") == (3 if frozen == "maps" else 6)
    started.clear()
    for values in (*case.weights, *case.biases):
        values.requires_grad_(False)
    if frozen != "maps":
        case.joined(kernels).backward(case.of_joined)
        assert "_end_parts" not in started


def test_maps_of_another_type_are_rounded_as_autocast_does(kernels: ModuleType) -> None:
    case, right = Case(16, 24, torch.bfloat16), Case(16, 24, torch.bfloat16)
    case.maps = [values.detach().float().requires_grad_() for values in case.maps]
    joined = case.joined(kernels)
    assert torch.equal(joined, right.joined(kernels))
    joined.backward(case.of_joined)
    assert all(values.grad is not None and values.grad.dtype == torch.float32 for values in case.maps)
