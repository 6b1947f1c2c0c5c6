"""The ends of heads by Triton's kernels, under its interpreter, against torch in double precision."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compiling import run_apart
from torch import nn
from torch.nn import functional as F

from paceline.models import ends
from paceline.models.convolution import BiasedConvolution
from paceline.models.heads import DetectionHead
from paceline.triton_kernels import are_left_out, kernels_left_out

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
def kernels(operations: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[ModuleType]:
    """Return the module that launches the kernels, which Triton's interpreter runs."""
    with operations("part_kernels", "end_kernels", "fused_ends") as module:
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
        return room.whole(pieces)

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
@pytest.mark.parametrize(("num_in", "num_out"), [(8, 1), (80, 3), (24, 24), (64, 64), (80, 80)])
def test_points_are_those_of_torch_in_double(
    kernels: ModuleType, num_in: int, num_out: int, dtype: torch.dtype
) -> None:
    for tiles in (kernels.CHOSEN, small(kernels, columns=32, more=16)):
        case = Case(num_in, num_out, dtype)
        case.check(case.joined(kernels, tiles=tiles))


@pytest.mark.parametrize(("num_in", "num_out"), [(144, 8), (8, 144), (16, 200), (16, 96)])
def test_wide_ones_are_cut_into_blocks(kernels: ModuleType, num_in: int, num_out: int) -> None:
    case = Case(num_in, num_out, torch.float16, images=1)
    case.check(case.joined(kernels))


@pytest.mark.parametrize("num_summed", [1, 16, 40, 64])
def test_products_of_one_turn_have_one_width(kernels: ModuleType, num_summed: int) -> None:
    """A second one is assembled wrongly for Hopper by what comes with Triton 3.6: boxes of yolov8x have 80 from 64."""
    for num_found in range(1, 400):
        tile = kernels.tile_of_product(num_found, num_summed)
        assert tile.depth >= num_summed
        assert (tile.more, tile.columns) == (0, min(max(1 << (num_found - 1).bit_length(), 16), 128))
    assert kernels.tile_of_product(80, 80).more == 16, "in a loop it is right"


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
    "a slice at an odd place": lambda values: F.pad(values, (3, 5), value=float("nan"))[:, :, 3:-5],
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


def head_of(num_classes: int = 5, *, depthwise: bool = True) -> DetectionHead:
    torch.manual_seed(0)
    head = DetectionHead((16, 24, 32), num_classes, reg_max=4, depthwise=depthwise)
    for branch in (*head.cv2, *head.cv3):
        nn.init.normal_(branch.get_parameter("2.bias"))
    return head.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload,no-any-return]


def levels_of(head: DetectionHead, images: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    widths = [branch[0].conv.in_channels for branch in head.cv2]  # type: ignore[index]
    maps = [torch.randn(images, width, side, side + 1) for width, side in zip(widths, (4, 2, 1), strict=True)]
    return [values.contiguous(memory_format=torch.channels_last).requires_grad_() for values in maps]


def trained(head: DetectionHead, levels: Sequence[Tensor], *, by_torch: bool) -> list[Tensor | None]:
    """The answers of a head, and the gradients of its levels and parameters."""
    with kernels_left_out() if by_torch else nullcontext():
        boxes, logits = head(*levels)
    draw = torch.Generator().manual_seed(2)
    slopes = [torch.randn(values.shape, generator=draw).to(values.dtype) for values in (boxes, logits)]
    leaves = [*levels, *(value for value in head.parameters() if value.requires_grad)]
    gradients = torch.autograd.grad((boxes, logits), leaves, slopes, allow_unused=True)
    return [boxes.detach(), logits.detach(), *gradients]


@pytest.fixture
def written(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, int]]:
    """Let heads on the CPU go by kernels, in single precision too; where each convolution has written, in what type."""
    found: list[tuple[torch.dtype, int]] = []
    taken = kernels.ended

    def noted(x: Tensor, weight: Tensor, bias: Tensor, joined: Tensor, first: int) -> Tensor:
        found.append((joined.dtype, first))
        result: Tensor = taken(x, weight, bias, joined, first)
        return result

    monkeypatch.setattr(kernels, "ended", noted)
    monkeypatch.setattr(ends, "TYPES", ends.TYPES | {torch.float32})
    monkeypatch.setattr(
        ends, "takes_map", lambda x: x.is_contiguous(memory_format=torch.channels_last) and not are_left_out()
    )
    return found


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("num_classes", [1, 16])
def test_a_head_is_the_same_by_kernels(
    written: list[tuple[torch.dtype, int]], num_classes: int, depthwise: bool
) -> None:
    head = head_of(num_classes, depthwise=depthwise)
    levels = levels_of(head)
    found = trained(head, levels, by_torch=False)
    assert written == [(torch.float32, first) for first in (0, 20, 26)] * 2
    for value, expected in zip(found, trained(head, levels, by_torch=True), strict=True):
        if expected is None:
            assert value is None
        else:
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert len(written) == 6
    answers = head.eval()(*levels)
    assert len(written) == 6, "evaluation is torch's"
    assert [answer.shape for answer in answers] == [(2, 28, 16), (2, 28, num_classes)]


@pytest.mark.parametrize("on_gpus", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_head_is_computed_in_its_type(
    written: list[tuple[torch.dtype, int]], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, on_gpus: bool
) -> None:
    """Gradients of weights and biases stay float32, also where `half_weights.py` takes them in their place."""
    monkeypatch.setattr("paceline.models.operations.half_weights.on_gpu", lambda values: on_gpus)
    head = head_of(16)
    levels = levels_of(head)
    joins: list[bool] = []
    monkeypatch.setattr(
        "paceline.models.operations.fused_ends.beside",
        lambda *read, joins_too=joins, joins: (joins_too.append(joins), nullcontext())[1],
    )
    with torch.autocast("cpu", dtype):
        found = trained(head, levels, by_torch=False)
        assert {kind for kind, _ in written} == {dtype}
        theirs = trained(head, levels, by_torch=True)
    assert joins == [on_gpus] * 6
    exact = trained(head, levels, by_torch=True)
    for value, other, right in zip(found, theirs, exact, strict=True):
        assert (value is None) == (right is None)
        if value is not None and other is not None and right is not None:
            assert value.dtype == other.dtype
            apart, usual = ((one.float() - right).norm() / right.norm().clamp(min=1e-3) for one in (value, other))
            assert float(apart) <= max(2 * float(usual), 4 * torch.finfo(dtype).eps)


class _Doubled(BiasedConvolution):
    """A convolution that somebody has changed."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


LEFT_TO_TORCH: dict[str, Callable[[DetectionHead], object]] = {
    "in evaluation": lambda head: head.eval(),
    "a kernel of three": lambda head: head.cv2[1].__setitem__(2, nn.Conv2d(16, 16, 3, padding=1)),  # type: ignore[operator]
    "no bias": lambda head: head.cv2[1].__setitem__(2, nn.Conv2d(16, 16, 1, bias=False)),  # type: ignore[operator]
    "an odd width": lambda head: head.cv2[1].__setitem__(2, BiasedConvolution(20, 16, 1)),  # type: ignore[operator]
    "another type": lambda head: head.cv2[1][2].bfloat16(),  # type: ignore[index]
    "another module": lambda head: head.cv2[1].__setitem__(2, nn.Identity()),  # type: ignore[operator]
    "another convolution": lambda head: head.cv2[1].__setitem__(2, _Doubled(16, 16, 1)),  # type: ignore[operator]
    "a hook before it": lambda head: head.cv2[1][2].register_forward_pre_hook(lambda *_: None),  # type: ignore[index]
    "a hook after it": lambda head: head.cv2[1][2].register_forward_hook(lambda *_: None),  # type: ignore[index]
    "a hook of a branch": lambda head: head.cv2[1].register_full_backward_hook(lambda *_: None),
    "another number of answers": lambda head: head.cv2[1].__setitem__(2, nn.Conv2d(16, 8, 1)),  # type: ignore[operator]
}


@pytest.mark.parametrize("why", list(LEFT_TO_TORCH))
def test_the_rest_is_left_to_torch(written: list[tuple[torch.dtype, int]], why: str) -> None:
    head = head_of()
    levels = levels_of(head)
    branches: Any = list(head.cv2)
    assert ends.room_for(branches, levels, 0) is not None
    with torch.no_grad():
        assert ends.room_for(branches, levels, 0) is None
    assert ends.room_for(branches, [values.contiguous() for values in levels], 0) is None
    LEFT_TO_TORCH[why](head)
    assert ends.room_for(list(head.cv2), levels, 0) is None  # type: ignore[arg-type]


def test_single_precision_and_cpus_are_torchs() -> None:
    head = head_of()
    assert ends.room_for(list(head.cv2), levels_of(head), 0) is None  # type: ignore[arg-type]


def test_a_compiled_head_joins(written: list[tuple[torch.dtype, int]]) -> None:
    head = head_of()
    torch.compile(head, backend="eager", fullgraph=True)(*levels_of(head))
    assert written == []


_PROGRAM = """
import re

from compiling import compiled, usage_of

from paceline.models.operations import end_kernels
from paceline.models.operations.fused_ends import tile_of_product, tile_of_weight


def built(kernel, tile, fixed, kinds, capability):
    fixed = fixed | {name: vars(tile)[name] for name in ("rows", "columns", "depth", "stages")}
    return compiled(kernel, fixed, kinds, warps=tile.warps, capability=capability)


def products(num_in, num_out, turned, kind, capability):
    found, summed = (num_in, num_out) if turned else (num_out, num_in)
    of_points = 8 if num_out % 8 == 0 else 1
    steps = (of_points, 8) if turned else (8, of_points)
    fixed = dict(num_summed=summed, num_found=found, given_step=steps[0], found_step=steps[1])
    kinds = dict(given=kind, weight=kind, found=kind, bias=kind if turned else "*fp32")
    tile = tile_of_product(found, summed)
    fixed |= dict(turned=turned, adds=not turned, more=tile.more)
    return built(end_kernels._multiply_end, tile, fixed, kinds, capability)


def sums(num_in, num_out, kind, capability):
    fixed = dict(num_in=num_in, num_out=num_out, step=8 if num_out % 8 == 0 else 1)
    kinds = dict(of_y=kind, x=kind, parts="*fp32")
    return built(end_kernels._end_parts, tile_of_weight(num_out, num_in), fixed, kinds, capability)


narrow = r"(ld|st)\\.global\\.b16"
for number, (num_in, num_out) in enumerate([(80, 80), (64, 64), (96, 64), (384, 80), (64, 3)]):
    for capability in (90, 89):
        kind = ("*bf16", "*fp16")[(number + capability) % 2]
        made = [products(num_in, num_out, turned, kind, capability) for turned in (False, True)]
        made.append(sums(num_in, num_out, kind, capability))
        for one in made:
            assert capability < 90 or not usage_of(one).spilled, (num_in, num_out)
            assert one.metadata.shared <= 99 * 1024, "what consumer cards have"
            assert capability < 90 or "wgmma.mma_async" in one.asm["ptx"]
            several = num_out % 8 == 0 and capability == 90
            assert not (several and re.search(narrow, one.asm["ptx"])), (num_in, num_out, "none is loaded alone")
print("compiled")
"""


def test_the_kernels_compile(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_apart(_PROGRAM, tmp_path) == "compiled"
