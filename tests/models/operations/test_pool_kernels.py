"""Max-pools by Triton's kernels, under its interpreter, against torch: the same numbers, the same choice of ties."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.models.blocks import SPPF

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import ModuleType

    from torch import Tensor


@pytest.fixture(scope="module")
def kernels(operations: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[ModuleType]:
    """Return the module that launches the kernels, which Triton's interpreter runs."""
    with operations("pool_kernels", "fused_pool") as module:
        yield module


def by_torch(x: Tensor, pools: int) -> Tensor:
    """Pool and join as a network without kernels does."""
    pieces = [x]
    for _ in range(pools):
        pieces.append(F.max_pool2d(pieces[-1], 5, 1, 2))
    return torch.cat(pieces, dim=1)


def both(kernels: ModuleType, x: Tensor, of_joined: Tensor, pools: int, *, rows: int, numbers: int) -> list[Tensor]:
    """Results and gradients by kernels, then by torch."""
    tile = kernels.Tile(rows=rows, numbers=numbers, warps=4)
    found = []
    for pool in (lambda x: kernels.pyramid(x, pools, tile=tile, gradient_tile=tile), lambda x: by_torch(x, pools)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        joined = pool(leaf)
        joined.backward(of_joined)
        assert leaf.grad is not None
        found += [joined.detach(), leaf.grad]
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[0].dtype == found[1].dtype == x.dtype
    return found


def random_map(shape: tuple[int, ...], *, values: int | None = None, seed: int = 0) -> Tensor:
    """Noise, channels-last; of so few values that ties are everywhere, if told."""
    torch.manual_seed(seed)
    noise = torch.randn(shape) if values is None else torch.randint(values, shape).float() - 1
    return noise.contiguous(memory_format=torch.channels_last)


CASES = [
    pytest.param((2, 16, 9, 7), None, id="noise"),
    pytest.param((2, 16, 9, 7), 3, id="ties"),
    pytest.param((1, 16, 9, 7), 1, id="one value"),
    pytest.param((1, 24, 5, 4), 4, id="three blocks of channels"),
    pytest.param((5, 8, 1, 6), 3, id="one line"),
    pytest.param((4, 8, 7, 1), 3, id="one column"),
    pytest.param((3, 8, 1, 1), None, id="one cell"),
]


@pytest.mark.parametrize(("shape", "values"), CASES)
def test_the_numbers_are_torchs(kernels: ModuleType, shape: tuple[int, ...], values: int | None) -> None:
    """To the last bit: in float32 both add the same numbers in the same order."""
    x = random_map(shape, values=values)
    of_joined = random_map((shape[0], 3 * shape[1], *shape[2:]), seed=1)
    joined, of_x, joined_of_torch, of_x_of_torch = both(kernels, x, of_joined, 2, rows=9, numbers=512)
    assert torch.equal(joined, joined_of_torch)
    assert torch.equal(of_x, of_x_of_torch)


@pytest.mark.parametrize(("rows", "numbers"), [(1, 128), (2, 256), (8, 64)])
def test_tiles_change_nothing(kernels: ModuleType, rows: int, numbers: int) -> None:
    x, of_joined = random_map((2, 8, 5, 4), values=4), random_map((2, 24, 5, 4), seed=1)
    joined, of_x, joined_of_torch, of_x_of_torch = both(kernels, x, of_joined, 2, rows=rows, numbers=numbers)
    assert torch.equal(joined, joined_of_torch)
    assert torch.equal(of_x, of_x_of_torch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_per_pool(kernels: ModuleType, dtype: torch.dtype) -> None:
    """Noise of such types is full of ties; of the gradient what torch adds up in float32 is rounded."""
    x = random_map((2, 8, 7, 6)).mul(3).round().div(3).to(dtype)
    of_joined = random_map((2, 16, 7, 6), seed=1).to(dtype)
    joined, of_x, _, _ = both(kernels, x, of_joined, 1, rows=7, numbers=512)
    leaf = x.float().requires_grad_()
    expected = by_torch(leaf, 1)
    expected.backward(of_joined.float())
    assert leaf.grad is not None
    assert torch.equal(joined.float(), expected.detach())
    if dtype is torch.float16:
        assert torch.equal(of_x, leaf.grad.to(dtype))
    else:  # which the interpreter cuts off instead of rounding
        torch.testing.assert_close(of_x.float(), leaf.grad, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("special", [float("nan"), -float("nan"), float("inf"), -float("inf"), -0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_none_are_chosen_as_torch_does(
    kernels: ModuleType, dtype: torch.dtype, special: float
) -> None:
    """The last of NaNs, the first of infinities and of zeros of either sign; a gradient comes to where it would."""
    torch.manual_seed(0)
    x = random_map((1, 16, 7, 6), values=2).to(dtype)
    x[:, :8][torch.rand(1, 8, 7, 6) < 0.1] = special
    x[:, 8:][torch.rand(1, 8, 7, 6) < 0.9] = special
    of_joined = torch.randint(-3, 4, (1, 32, 7, 6)).to(dtype).contiguous(memory_format=torch.channels_last)
    joined, of_x, joined_of_torch, of_x_of_torch = both(kernels, x, of_joined, 1, rows=7, numbers=512)
    torch.testing.assert_close(joined, joined_of_torch, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(of_x, of_x_of_torch)  # sums of small whole numbers, exact in every type


@pytest.mark.parametrize("way", ["slice", "odd slice", "channels first", "expanded"])
def test_maps_and_gradients_may_lie_anywhere(kernels: ModuleType, way: str) -> None:
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "slice": lambda values: inside_of(values, before=8, after=16),
        "odd slice": lambda values: inside_of(values, before=3, after=2),
        "channels first": lambda values: values.contiguous(),
        "expanded": lambda values: values[:1, :1, :1, :1].expand_as(values),
    }
    x, of_joined = random_map((2, 8, 6, 5)), random_map((2, 16, 6, 5), seed=1)
    x, of_joined = ways[way](x), ways[way](of_joined)
    leaf = x.detach().requires_grad_()
    expected = by_torch(leaf, 1)
    expected.backward(of_joined)
    again = x.detach().requires_grad_()
    joined = kernels.pyramid(again, 1)
    joined.backward(of_joined)
    assert torch.equal(joined, expected)
    assert again.grad is not None
    assert leaf.grad is not None
    assert torch.equal(again.grad, leaf.grad)


def inside_of(values: Tensor, *, before: int, after: int) -> Tensor:
    """Return the same numbers as a slice of a wider map, which is full of NaN else."""
    images, channels, height, width = values.shape
    wide = torch.full((images, before + channels + after, height, width), float("nan"))
    wide = wide.contiguous(memory_format=torch.channels_last)
    wide[:, before : before + channels] = values
    return wide[:, before : before + channels]


@pytest.mark.parametrize("channels", [16, 12])
def test_a_block_is_the_same_by_kernels(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    """Where eight divides the channels; else it does without them."""
    torch.manual_seed(0)
    block = SPPF(2 * channels, 16).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images = random_map((2, 2 * channels, 6, 5))
    calls: list[int] = []
    taken = kernels.pyramid

    def counted(x: Tensor, pools: int) -> Tensor:
        calls.append(pools)
        joined: Tensor = taken(x, pools)
        return joined

    monkeypatch.setattr(kernels, "pyramid", counted)
    found = []
    for by_kernels in (False, True):
        monkeypatch.setattr("paceline.models.blocks.takes_map", lambda x, answer=by_kernels: answer)
        x = images.clone(memory_format=torch.preserve_format).requires_grad_()
        y = block(x)
        block.zero_grad()
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(value.grad for value in block.parameters())])
    assert calls == ([3] if channels == 16 else [])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    block.eval()
    block(images)
    assert len(calls) < 2, "in evaluation there is no gradient to be prepared for"


def test_no_pass_over_memory_is_made_beside_the_kernels(kernels: ModuleType) -> None:
    x, of_joined = random_map((2, 8, 5, 4)).requires_grad_(), random_map((2, 32, 5, 4), seed=1)
    with Named() as named:
        kernels.pyramid(x, 3).backward(of_joined)
    views = {"split", "select", "permute", "unbind", "detach"}
    made = {"new_empty", "empty_like"}
    by_the_interpreter = {"empty", "set_", "copy_"}
    assert named.operations <= views | made | by_the_interpreter


class Named(TorchDispatchMode):
    """Notes what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, given: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        self.operations.add(operation.overloadpacket.__name__)
        return operation(*given, **named or {})
