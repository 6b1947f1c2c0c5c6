"""Norms by compiled code on a CPU against their definition in double precision, at every level, type and layout."""

from __future__ import annotations

import copy
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch
from fill_rule import images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from paceline.models.blocks import FoldedNorm
from paceline.models.fusion import fuse
from paceline.models.operations import compiled_norm
from paceline.models.operations.compiled_norm import activated_in_place, kernels_for, normed_and_activated
from paceline.native import norm
from paceline.triton_kernels import kernels_left_out

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from paceline.models.graph import DetectionModel

EPS = 1e-3
ERRORS = {torch.float32: 5e-6, torch.bfloat16: 6e-3}
"""Largest errors as shares of the length of a tensor; bfloat16 has eight bits."""
pytestmark = pytest.mark.skipif(norm.NORM.get() is None, reason="they were not built")


@contextmanager
def at_level(level: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "_level", lambda kernels: level)
        yield


def levels() -> range:
    found = norm.NORM.get()
    assert found is not None
    return range(found.paceline_level() + 1)


def channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def fused(
    x: Tensor, weight: Tensor, bias: Tensor, *, silu: bool, pieces: int, carried: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    found = norm.NORM.get()
    assert found is not None
    latest = (torch.full_like(weight, 7.0), torch.full_like(weight, 7.0))
    z = normed_and_activated(x, weight, bias, latest, found, eps=EPS, silu=silu, pieces=pieces, carried=carried)
    return z, latest


def defined(x: Tensor, weight: Tensor, bias: Tensor, *, silu: bool, carried: Tensor | None) -> Tensor:
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    z = (x - mean) / (variance + EPS).sqrt() * weight[:, None, None] + bias[:, None, None]
    z = F.silu(z) if silu else z
    return z if carried is None else carried + z


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=1.0))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(3, 20), st.integers(4, 20)),
    dtype=st.sampled_from(list(ERRORS)),
    silu=st.booleans(),
    way=st.sampled_from(["whole", "halves", "carried", "carried part"]),
    parts=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_the_definition_forward_and_backward_at_every_level(
    shape: tuple[int, int, int, int], dtype: torch.dtype, silu: bool, way: str, parts: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    pieces = 2 if way == "halves" else 1
    batch, channels, height, width = shape[0], shape[1] * pieces, *shape[2:]
    x = channels_last((torch.randn(batch, channels, height, width, generator=random) * 3 + 5).to(dtype))
    weight, bias = torch.rand(channels, generator=random) + 0.2, torch.randn(channels, generator=random)
    carried = None
    if way.startswith("carried"):
        wide = channels_last(torch.randn(batch, channels + 3, height, width, generator=random).to(dtype))
        carried = wide[:, 2:-1] if way == "carried part" else channels_last(wide[:, :-3])
    given = channels_last(torch.randn(batch, channels + 5, height, width, generator=random).to(dtype))
    given = given[:, 2:-3] if parts else channels_last(given[:, :-5])

    inputs = [value.detach().double().requires_grad_() for value in (x, weight, bias)]
    beside = None if carried is None else carried.double().requires_grad_()
    exact = defined(*inputs, silu=silu, carried=beside)
    of_exact = torch.autograd.grad(exact, [*inputs, *([] if beside is None else [beside])], given.double())
    for level in levels():
        ours = [value.detach().clone().requires_grad_() for value in (x, weight, bias)]
        ours[0] = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        mine = None if carried is None else carried.detach().requires_grad_()
        with at_level(level):
            z, latest = fused(*ours, silu=silu, pieces=pieces, carried=mine)
            found = torch.autograd.grad(
                z, [*ours, *([] if mine is None else [mine])], torch.chunk(given, pieces, dim=1)
            )
        assert all(piece.dtype == dtype for piece in z)
        assert all(piece.is_contiguous(memory_format=torch.channels_last) for piece in z)
        assert error(torch.cat(z, dim=1), exact) < ERRORS[dtype]
        assert all(error(value, other) < ERRORS[dtype] for value, other in zip(found, of_exact, strict=True))
        assert torch.allclose(latest[0].double(), inputs[0].mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
        assert torch.allclose(latest[1].double(), inputs[0].var((0, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none_in_its_channel_alone(dtype: torch.dtype, value: float) -> None:
    for level in levels():
        x = channels_last(torch.randn(2, 24, 9, 9, generator=torch.Generator().manual_seed(0)).to(dtype))
        x[1, 3, 4, 5] = value
        x.requires_grad_()
        weight, bias = torch.ones(24, requires_grad=True), torch.zeros(24, requires_grad=True)
        with at_level(level):
            (z,), latest = fused(x, weight, bias, silu=True, pieces=1, carried=None)
            found = torch.autograd.grad(z, [x, weight, bias], torch.ones_like(z))
        others = [channel for channel in range(24) if channel != 3]
        for values in (z[:, 3], latest[1][3], found[0][:, 3], found[1][3]):
            assert torch.isnan(values).all()
        for values in (z[:, others], latest[1][others], found[0][:, others], found[1][others], found[2][others]):
            assert torch.isfinite(values).all()


@pytest.mark.parametrize("dtype", list(ERRORS))
def test_a_gradient_that_is_no_number_is_passed_on(dtype: torch.dtype) -> None:
    for level in levels():
        x = channels_last(
            torch.randn(2, 24, 9, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
        ).requires_grad_()
        weight, bias = torch.ones(24, requires_grad=True), torch.zeros(24, requires_grad=True)
        with at_level(level):
            (z,), _ = fused(x, weight, bias, silu=True, pieces=1, carried=None)
            of_z = torch.ones_like(z)
            of_z[0, 7, 0, 0] = float("nan")
            of_x, of_weight, of_bias = torch.autograd.grad(z, [x, weight, bias], of_z)
        assert torch.isnan(of_x[:, 7]).all()
        assert torch.isnan(torch.stack((of_weight[7], of_bias[7]))).all()
        assert torch.isfinite(of_x[:, :7]).all()


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_number_of_threads_changes_no_bit(pieces: int) -> None:
    threads, results = torch.get_num_threads(), []
    x = channels_last(torch.randn(4, 48, 40, 40, generator=torch.Generator().manual_seed(0)))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            ours = [
                value.clone().requires_grad_()
                for value in (x, torch.rand(48, generator=torch.Generator().manual_seed(1)), torch.zeros(48))
            ]
            z, latest = fused(*ours, silu=True, pieces=pieces, carried=None)
            found = torch.autograd.grad(z, ours, [piece.detach().cos() for piece in z])
            results.append([*z, *latest, *found])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, same) for value, same in zip(results[0], other, strict=True))


def test_both_types_are_as_quick_backward() -> None:
    """Float32 has twice the bytes; where its loops go number by number it takes four times as long."""
    found = norm.NORM.get()
    assert found is not None
    if found.paceline_level() < 2:
        pytest.skip("without vector units")
    least = dict.fromkeys(ERRORS, float("inf"))
    for _ in range(15):
        for dtype in ERRORS:
            x = channels_last(torch.randn(2, 64, 40, 40).to(dtype)).requires_grad_()
            (z,), _ = fused(x, torch.ones(64), torch.zeros(64), silu=True, pieces=1, carried=None)
            of_z = torch.ones_like(z)
            start = time.perf_counter()
            torch.autograd.grad(z, [x], of_z)
            least[dtype] = min(least[dtype], time.perf_counter() - start)
    assert least[torch.float32] < 3 * least[torch.bfloat16]


def test_large_numbers_far_from_zero_keep_their_variance() -> None:
    x = channels_last(
        torch.randn(2, 16, 30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1000
    )
    (_,), latest = fused(x.float(), torch.ones(16), torch.zeros(16), silu=False, pieces=1, carried=None)
    assert torch.allclose(latest[1].double(), x.float().double().var((0, 2, 3)), rtol=1e-4)


def test_extremes_of_the_activation_are_its_limits() -> None:
    """SiLU of -1e4 is nothing, of 1e4 it is that; slopes are 0 and 1."""
    for dtype in ERRORS:
        for level in levels():
            x = channels_last(torch.tensor([-1.0, 1.0]).repeat(32).view(1, 1, 8, 8).to(dtype)).requires_grad_()
            weight, bias = torch.full((1,), 1e4), torch.zeros(1, requires_grad=True)
            with at_level(level):
                (z,), _ = fused(x, weight, bias, silu=True, pieces=1, carried=None)
                (of_bias,) = torch.autograd.grad(z, [bias], torch.ones_like(z))
            right = torch.where(x > 0, 1e4 / (1 + EPS) ** 0.5, 0.0)
            assert torch.allclose(z.float(), right, rtol=ERRORS[dtype])
            assert float(of_bias) == pytest.approx(32.0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-8 + 2e-4)])
def test_the_activation_is_right_but_for_rounding_wherever_it_is(dtype: torch.dtype, bound: float) -> None:
    """As a share of each number: a bfloat16 has its rounding, and two parts of ten thousand of the sigmoid."""
    x = channels_last(torch.linspace(-1, 1, 2 * 61 * 67).view(2, 1, 61, 67).to(dtype))
    weight, bias = torch.full((1,), 12.0), torch.full((1,), 0.25)
    exact = defined(x.double(), weight.double(), bias.double(), silu=True, carried=None)
    for level in levels():
        with at_level(level):
            (z,), _ = fused(x, weight, bias, silu=True, pieces=1, carried=None)
        wrong = (z.double() - exact).abs() / exact.abs().clamp(min=0.01)
        assert float(wrong.max()) < bound


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from(list(ERRORS)),
    way=st.sampled_from(["whole", "halves", "carried", "carried part"]),
    seed=st.integers(0, 99),
)
def test_the_activation_alone_is_its_definition_at_every_level(
    shape: tuple[int, int, int, int], dtype: torch.dtype, way: str, seed: int
) -> None:
    found, random = norm.NORM.get(), torch.Generator().manual_seed(seed)
    assert found is not None
    batch, channels, height, width = shape
    channels *= 2 if way == "halves" else 1
    x = channels_last(torch.randn(batch, channels, height, width, generator=random) * 4).to(dtype)
    carried = None
    if way.startswith("carried"):
        wider = channels_last(torch.randn(batch, channels + 3, height, width, generator=random)).to(dtype)
        carried = wider[:, 2 : 2 + channels] if way == "carried part" else channels_last(wider[:, :channels])
    exact = F.silu(x.double()) + (0 if carried is None else carried.double())
    for level in levels():
        mine = x.clone()
        with at_level(level):
            z = activated_in_place(mine, found, pieces=2 if way == "halves" else 1, carried=carried)
        assert error(torch.cat(z, dim=1), exact) < ERRORS[dtype]
        assert all(piece.is_contiguous(memory_format=torch.channels_last) for piece in z)
        assert torch.equal(mine, x) if way == "halves" else z[0] is mine


@pytest.mark.parametrize("dtype", [*ERRORS, torch.float64])
def test_a_folded_norm_activates_by_torch_what_others_may_still_need(dtype: torch.dtype) -> None:
    folded, x = FoldedNorm(), channels_last(torch.randn(2, 6, 5, 5).to(dtype))
    for given_x, activation, no_grad in (
        (x, nn.SiLU(), False),  # its gradient may be asked for
        (x, nn.Identity(), True),
        (x[:, :3], nn.SiLU(), True),
        (torch.zeros(0, 6, 5, 5, dtype=dtype), nn.SiLU(), True),
    ):
        before = given_x.clone()
        with torch.set_grad_enabled(not no_grad):
            (z,) = folded.activated(given_x, activation)
            halves = folded.activated(given_x[:, :2], activation, 2)
            (added,) = folded.activated(given_x, activation, carried=2 * given_x)
        assert torch.equal(given_x, before)
        torch.testing.assert_close(z, activation(given_x))
        torch.testing.assert_close(torch.cat(halves, dim=1), z[:, :2])
        torch.testing.assert_close(added, 2 * given_x + z)


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(ERRORS))
def test_a_fused_network_answers_what_it_does_by_torch(filled_model: DetectionModel, dtype: torch.dtype) -> None:
    x = images(torch.float64)
    exact = filled_model(x)
    network = copy.deepcopy(filled_model).float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours = fuse(network, for_autocast=None if dtype == torch.float32 else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        answers = ours(channels_last(x.float()))
        repeated = ours(channels_last(x.float()))
        with kernels_left_out():
            theirs = ours(channels_last(x.float()))
    assert not all(torch.equal(mine, other) for mine, other in zip(answers, theirs, strict=True)), "by other code"
    for mine, again, other, right in zip(answers, repeated, theirs, exact, strict=True):
        assert torch.equal(mine, again)
        assert error(mine, right) < max(2 * error(other, right), 1e-6)


def test_gradients_of_weights_are_sums_of_what_was_not_rounded() -> None:
    """Those of bfloat16 maps are nearer to double precision than any bfloat16 number may be."""
    random = torch.Generator().manual_seed(0)
    x = channels_last((torch.randn(4, 24, 30, 30, generator=random) * 3).bfloat16())
    of_z = channels_last(torch.randn(4, 24, 30, 30, generator=random).bfloat16())
    weight, bias = torch.rand(24, generator=random) + 0.2, torch.randn(24, generator=random)
    inputs = [value.double().requires_grad_() for value in (weight, bias)]
    exact = torch.autograd.grad(defined(x.double(), *inputs, silu=True, carried=None), inputs, of_z.double())
    for level in levels():
        ours = [value.clone().requires_grad_() for value in (weight, bias)]
        with at_level(level):
            (z,), _ = fused(x, *ours, silu=True, pieces=1, carried=None)
            found = torch.autograd.grad(z, ours, of_z)
        assert all(error(value, other) < 2e-4 for value, other in zip(found, exact, strict=True))


def test_what_it_does_not_take_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = channels_last(torch.zeros(1, 8, 4, 4))
    monkeypatch.setattr(norm, "_level", lambda kernels: 2)
    assert kernels_for(x) is not None
    assert kernels_for(x.bfloat16()) is not None
    assert kernels_for(x.double()) is None
    assert kernels_for(x.half()) is None
    assert kernels_for(x.to("meta")) is None
    monkeypatch.setattr(norm, "team", lambda: None)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert kernels_for(x) is None, "torch would use two"
        torch.set_num_threads(1)
        assert kernels_for(x) is not None
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(norm, "_level", lambda kernels: 0)
    assert kernels_for(x) is None, "it would be slower"
    monkeypatch.setattr(norm.NORM, "get", lambda: None)
    assert compiled_norm.kernels_for(x) is None
