"""The gradient of the first convolution's result, which a norm leaves unwritten, under Triton's interpreter."""

from __future__ import annotations

import gc
import importlib
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paceline.models.operations.handover import Handover, Unapplied
from paceline.models.operations.moments import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import ModuleType

    from torch import Tensor

MODULES = ("moment_kernels", "norm_kernels", "fused_norm", "stem_kernels", "fused_stem")
EPS = 1e-3


@pytest.fixture(scope="module")
def kernels(operations: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[dict[str, ModuleType]]:
    """Return the modules that launch kernels, which Triton's interpreter runs, by name."""
    with operations(*MODULES):
        yield {name: importlib.import_module(f"paceline.models.operations.{name}") for name in MODULES}


class Unit:
    """A convolution of images, a norm with numbers of its own, and SiLU or nothing."""

    def __init__(self, shape: tuple[int, int, int], filters: int, stride: int, *, silu: bool = True) -> None:
        images, height, width = shape
        torch.manual_seed(sum(shape) + filters + stride)
        self.stride, self.silu = stride, silu
        self.x = torch.rand(images, 3, height, width).contiguous(memory_format=torch.channels_last)
        self.weights = torch.randn(filters, 3, 3, 3), torch.rand(filters) + 0.5, torch.randn(filters)
        shape_of_z = images, filters, (height - 1) // stride + 1, (width - 1) // stride + 1
        self.of_z = torch.randn(shape_of_z).contiguous(memory_format=torch.channels_last)

    def by_kernels(
        self, kernels: dict[str, ModuleType], dtype: torch.dtype = torch.float32, *, hands_over: bool = True
    ) -> list[Tensor]:
        """Return z and the gradients of weight, norm's weight and norm's bias; `hands_over`: by one kernel less."""
        leaves = [value.clone().requires_grad_() for value in self.weights]
        stem = kernels["fused_stem"]
        launch = stem.Launch(groups=16, filters=16, warps=4, stages=2, programs=5)
        tally = Tally()
        y = stem.convolved(self.x, leaves[0], stride=self.stride, dtype=dtype, tally=tally, normed=launch)
        moments = tally.moments
        assert moments is not None
        assert moments.handover is not None
        latest = torch.zeros(2, len(leaves[1])).unbind()
        given = moments if hands_over else None
        (z,) = kernels["fused_norm"].normed_and_activated(
            y, *leaves[1:], latest, eps=EPS, silu=self.silu, moments=given
        )
        z.backward(self.of_z.to(dtype))
        assert moments.handover.take() is None, "what was left was taken"
        return [z.detach(), *(value.grad for value in leaves if value.grad is not None)]

    def exactly(self) -> list[Tensor]:
        """Return the same by torch in double."""
        leaves = [value.double().requires_grad_() for value in self.weights]
        y = F.conv2d(self.x.double(), leaves[0], stride=self.stride, padding=1)
        z = F.batch_norm(y, None, None, *leaves[1:], training=True, eps=EPS)
        z = F.silu(z) if self.silu else z
        z.backward(self.of_z.double())
        return [z.detach(), *(value.grad for value in leaves if value.grad is not None)]


def differ(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest number."""
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max() / expected.abs().max())


CASES = [
    pytest.param((2, 16, 24), 16, 2, id="plain"),
    pytest.param((2, 13, 19), 16, 2, id="odd height and width"),
    pytest.param((1, 9, 22), 8, 1, id="stride one, lines that end within a group"),
    pytest.param((2, 12, 16), 48, 2, id="three blocks of filters"),
    pytest.param((1, 1, 3), 8, 2, id="two cells"),
]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("shape", "filters", "stride"), CASES)
def test_gradients_are_those_in_double(
    kernels: dict[str, ModuleType], shape: tuple[int, int, int], filters: int, stride: int, silu: bool
) -> None:
    unit = Unit(shape, filters, stride, silu=silu)
    for found, expected in zip(unit.by_kernels(kernels), unit.exactly(), strict=True):
        assert differ(found, expected) < 3e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_what_the_norm_would_have_written(kernels: dict[str, ModuleType], dtype: torch.dtype) -> None:
    """Rounded in the same place, to the same type."""
    unit = Unit((2, 13, 24), 16, 2)
    unit.of_z = inside_of(unit.of_z)
    found, written = (unit.by_kernels(kernels, dtype, hands_over=over) for over in (True, False))
    for value, right in zip(found, written, strict=True):
        assert differ(value, right) < (1e-5 if dtype is torch.float32 else 2e-3)


def inside_of(values: Tensor) -> Tensor:
    """Return the same numbers as a slice of a wider map, which is full of NaN else."""
    images, channels, height, width = values.shape
    wide = torch.full((images, channels + 16, height, width), float("nan")).contiguous(
        memory_format=torch.channels_last
    )
    wide[:, 8:-8] = values
    return wide[:, 8:-8]


def test_the_gradient_is_not_written(kernels: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    for module in (kernels["fused_norm"], kernels["fused_stem"]):

        def noted(kernel: Any, *given: Any, start: Any = module.start_kernel, **options: Any) -> None:
            names.append(kernel.fn.__name__)
            start(kernel, *given, **options)

        monkeypatch.setattr(module, "start_kernel", noted)
    unit = Unit((2, 16, 24), 16, 2)
    unit.by_kernels(kernels)
    assert names[-4:] == ["_gradient_sums", "_settle_sums", "_multiply", "_settle"]
    names.clear()
    unit.by_kernels(kernels, hands_over=False)
    assert names[-5:] == ["_gradient_sums", "_settle_sums", "_apply_gradient", "_multiply", "_settle"]


def test_a_second_backward_pass_is_the_same(kernels: dict[str, ModuleType]) -> None:
    unit, tally = Unit((1, 8, 8), 8, 2), Tally()
    weight, slope, shift = (value.clone().requires_grad_() for value in unit.weights)
    y = kernels["fused_stem"].convolved(unit.x, weight, stride=2, dtype=torch.float32, tally=tally)
    latest = torch.zeros(2, 8).unbind()
    (z,) = kernels["fused_norm"].normed_and_activated(
        y, slope, shift, latest, eps=EPS, silu=True, moments=tally.moments
    )
    found = [torch.autograd.grad(z, (weight, slope, shift), unit.of_z, retain_graph=True) for _ in range(2)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    (alone,) = torch.autograd.grad(z, slope, unit.of_z, retain_graph=True)  # what the norm leaves, nobody takes
    assert torch.equal(alone, found[0][1])
    held = weakref.ref(y.grad_fn)
    del y, z, tally
    gc.disable()
    try:
        assert held() is None, "nothing that is left holds the graph that it is of"
    finally:
        gc.enable()


def test_a_norm_that_leaves_nothing_gives_the_gradient(kernels: dict[str, ModuleType]) -> None:
    unit, tally = Unit((2, 9, 11), 16, 2), Tally()
    weight = unit.weights[0].clone().requires_grad_()
    y = kernels["fused_stem"].convolved(unit.x, weight, stride=2, dtype=torch.float32, tally=tally)
    norm = nn.BatchNorm2d(16, eps=EPS)
    F.silu(norm(y)).backward(unit.of_z)
    unit.weights = (unit.weights[0], torch.ones(16), torch.zeros(16))
    assert weight.grad is not None
    assert differ(weight.grad, unit.exactly()[1]) < 3e-5


def test_what_is_left_is_taken_once() -> None:
    handover, y = Handover(), torch.randn(2, 4, 3, 3)
    assert handover.take() is None
    several = torch.zeros(2, 4)
    left = Unapplied(of_z=y, pitch=4, y=y, kept=several, weight=y, bias=y, of_affine=several, silu=True)
    placeholder = handover.leave(left)
    assert placeholder.shape == y.shape
    assert placeholder.dtype == y.dtype
    assert placeholder.untyped_storage().data_ptr() == y.untyped_storage().data_ptr(), "no memory of its own"
    assert handover.take() is left
    assert handover.take() is None
