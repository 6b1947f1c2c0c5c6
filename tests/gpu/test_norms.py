"""Batch norm and activation by kernels on a CUDA device, against torch there."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING
from unittest import mock

import pytest
import torch
from steps import make_step, run, works
from torch.nn import functional as F

from paceline.models.operations.shared import shared
from paceline.models.registry import build_model
from paceline.parallel.norms import BatchNorm
from paceline.triton_kernels import usable

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
EPS = 1e-3
SHAPES = [(64, 16, 320, 320), (64, 80, 80, 80), (64, 8, 160, 160), (16, 512, 20, 20), (3, 20, 7, 9), (2, 192, 1, 1)]


def both_ways(
    shape: tuple[int, int, int, int], dtype: torch.dtype, *, silu: bool, pieces: int
) -> list[tuple[Tensor, ...]]:
    """Results, statistics and gradients by kernels, and by torch in float32."""
    from paceline.models.operations.fused_norm import normed_and_activated

    torch.manual_seed(0)
    channels = shape[1]
    values = (torch.randn(shape, device=DEVICE) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    wide = torch.randn(shape[0], channels + 8, *shape[2:], device=DEVICE, dtype=dtype)
    of_z = wide.contiguous(memory_format=torch.channels_last)[:, 8:]
    affine = torch.rand(channels, device=DEVICE) + 0.5, torch.randn(channels, device=DEVICE)
    found = []
    for by_kernels in (True, False):
        y = values.clone() if by_kernels else values.float()
        leaves = [value.clone().requires_grad_() for value in (y, *affine)]
        latest = (torch.empty(channels, device=DEVICE), torch.empty(channels, device=DEVICE))
        if by_kernels:
            z = normed_and_activated(*leaves, latest, eps=EPS, silu=silu, pieces=pieces)
            torch.autograd.backward(z, of_z.chunk(pieces, dim=1))
        else:
            normed = F.batch_norm(leaves[0], *latest, leaves[1], leaves[2], True, 1.0, EPS)
            z = (F.silu(normed) if silu else normed).chunk(pieces, dim=1)
            torch.autograd.backward(z, of_z.float().chunk(pieces, dim=1))
        gradients = [value.grad for value in leaves]
        found.append((torch.cat(z, dim=1).detach(), *latest, *(value for value in gradients if value is not None)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_torch(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for silu, pieces in ((True, 1), (False, 1), (True, 2)):
        if shape[1] % (8 * pieces) and pieces == 2:
            continue
        found, expected = both_ways(shape, dtype, silu=silu, pieces=pieces)
        again, _ = both_ways(shape, dtype, silu=silu, pieces=pieces)
        for value, right, same in zip(found, expected, again, strict=True):
            bound = 1e-4 if value.dtype is torch.float32 else 2 * torch.finfo(value.dtype).eps
            difference = (value.float() - right.float()).abs().max() / right.float().abs().max()
            assert bool(torch.isfinite(value).all())
            assert float(difference) < bound, (silu, pieces)
            assert torch.equal(value, same), "no sum depends on who comes first"


@pytest.mark.parametrize("uses", [(2,), (4,), (1, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 80, 80), (3, 48, 7, 9), (2, 16, 1, 3)], ids=str)
def test_gradients_of_several_uses_are_added_up(shape: tuple[int, int, int, int], uses: tuple[int, ...]) -> None:
    """To the bit what autograd adds, where there are two; else it has rounded more often."""
    from paceline.models.operations.fused_norm import normed_and_activated

    torch.manual_seed(0)
    channels, pieces = shape[1], len(uses)
    y, carried, *given = (
        torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        for _ in range(2 + max(uses))
    )
    affine = torch.rand(channels, device=DEVICE) + 0.5, torch.randn(channels, device=DEVICE)
    leaves = [value.requires_grad_() for value in (y, *affine, *([carried] if pieces == 1 else []))]
    latest = (torch.empty(channels, device=DEVICE), torch.empty(channels, device=DEVICE))
    parts = [value.chunk(pieces, dim=1) for value in given]  # in two halves slices of wider maps
    found = []
    for by_norm in (True, False, True):
        z = normed_and_activated(
            *leaves[:3], latest, eps=EPS, silu=True, pieces=pieces, carried=carried if pieces == 1 else None
        )
        with nullcontext() if by_norm else mock.patch("paceline.models.operations.shared._left_of", return_value=None):
            aliases = [shared(piece, count) for piece, count in zip(z, uses, strict=True)]
        slopes = [parts[number][piece] for piece, count in enumerate(uses) for number in range(count)]
        torch.manual_seed(1)
        used = [alias * slope for alias, slope in zip(chain(*aliases), slopes, strict=True)]
        found.append(torch.autograd.grad(used, leaves, [torch.randn_like(value) for value in used]))
    for ours, theirs, again in zip(*found, strict=True):
        assert torch.equal(ours, again)
        if max(uses) == 2:
            assert torch.equal(ours, theirs)
        assert float((ours - theirs).float().norm() / theirs.float().norm()) < 1e-2


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_a_training_by_kernels_is_the_one_without(
    monkeypatch: pytest.MonkeyPatch, amp_dtype: torch.dtype | None
) -> None:
    assert usable(DEVICE)
    losses = []
    for by_kernels in (True, False):
        torch.manual_seed(0)
        network = build_model("yolo11n", 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = make_step("SGD", network=network, dtype=torch.float32, device="cuda", amp_dtype=amp_dtype)
        if not by_kernels:
            monkeypatch.setattr(BatchNorm, "_has_kernels", lambda norm, x: False)
        losses.append(torch.stack([value.float() for value in run(step, works(10, "SGD", device="cuda"))]))
    bound = 2e-3 if amp_dtype is None else 5e-2
    torch.testing.assert_close(losses[0], losses[1], rtol=bound, atol=bound)
