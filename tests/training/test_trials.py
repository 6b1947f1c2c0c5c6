"""Trials and plans: every plan trains, all alike, and the network of the run is left alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from tiny import SGD, setting, tiny

from paceline import triton_kernels
from paceline.ledger import Ledger
from paceline.parallel.single import SingleEngine
from paceline.training.compiling import Compiler
from paceline.training.ema import Ema
from paceline.training.optim import build_optimizer
from paceline.training.plan import StepPlan, carrying_out, laid_out, threads_of
from paceline.training.precision import Precision
from paceline.training.schedule import Rates
from paceline.training.step import EagerStep
from paceline.training.trials import StepTrials, noise

if TYPE_CHECKING:
    from paceline.models.graph import DetectionModel

FP32, BF16 = Precision(name="fp32"), Precision(name="bf16")
RATES = Rates(lr=0.01, bias_lr=0.01, momentum=0.9)


def train(plan: StepPlan, updates: int = 6) -> tuple[list[float], DetectionModel, list[torch.Tensor]]:
    """Train as planned; returns losses, network, and the forms that its convolutions were given."""
    network = laid_out(tiny(), channels_last=plan.channels_last).train()
    made = setting(network)
    engine = SingleEngine(network, made.cast.criterion, amp_dtype=plan.precision.amp_dtype, clip=10.0, ledger=Ledger())
    step = EagerStep(engine, build_optimizer(SGD, network), Ema(network), Ledger())
    batch = noise(4, made)
    batch = batch if plan.channels_last else batch.channels_first()
    outputs: list[torch.Tensor] = []
    network.model["0"].register_forward_hook(lambda module, given, output: outputs.append(output.detach()))
    losses = []
    with threads_of(plan):
        for number in range(updates):
            outcome = step(batch, RATES, completes=number % 2 == 1)
            losses.append(float(outcome.sums.total))
    return losses, network, outputs


@pytest.mark.parametrize(
    ("plan", "tolerance"),
    [
        (StepPlan(precision=FP32, channels_last=False), 1e-5),
        (StepPlan(precision=FP32, threads=1), 1e-5),
        (StepPlan(precision=FP32, threads=2, channels_last=False), 1e-5),
        (StepPlan(precision=BF16), 3e-2),
        (StepPlan(precision=BF16, channels_last=False), 3e-2),
    ],
    ids=str,
)
def test_every_plan_trains_as_the_plain_one_does(plan: StepPlan, tolerance: float) -> None:
    expected, usual, _ = train(StepPlan(precision=FP32))
    losses, network, _ = train(plan)
    assert expected[-1] < expected[0]
    assert losses == pytest.approx(expected, rel=tolerance)
    if plan.precision == FP32:
        for key, value in usual.state_dict().items():
            torch.testing.assert_close(network.state_dict()[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_layout_is_carried_out_down_to_the_activations(channels_last: bool) -> None:
    _, network, outputs = train(StepPlan(precision=FP32, channels_last=channels_last), updates=1)
    is_last = [value.is_contiguous(memory_format=torch.channels_last) for value in outputs]
    assert is_last == [channels_last]
    weight = network.model["4"].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_a_plan_without_kernels_is_built_and_taken_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "_works_on", lambda number: True)
    gpu, seen = torch.device("cuda", 0), []

    def ask(module: object, given: object) -> None:
        seen.append(triton_kernels.usable(gpu))

    network = tiny()
    network.register_forward_pre_hook(ask)
    with StepTrials(setting(network), 2) as trials:
        for kernels in (True, False, True):
            plan = StepPlan(precision=FP32, kernels=kernels)
            assert trials.seconds(plan) < math.inf
            assert seen == [kernels]
            seen.clear()
    assert triton_kernels.usable(gpu)
    with carrying_out(StepPlan(precision=FP32, kernels=False)):
        assert not triton_kernels.usable(gpu)
        with pytest.raises(ValueError, match="so"), triton_kernels.kernels_left_out():
            raise ValueError("so")
        assert not triton_kernels.usable(gpu)
    assert triton_kernels.usable(gpu)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with threads_of(StepPlan(precision=FP32, threads=before + 1)):
        assert torch.get_num_threads() == before + 1
    with pytest.raises(KeyError), threads_of(StepPlan(precision=FP32, threads=before + 1)):
        raise KeyError
    assert torch.get_num_threads() == before


def test_trials_time_every_plan_and_leave_network_random_state_and_threads_alone() -> None:
    network = tiny()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    with StepTrials(setting(network), 2) as trials:
        for plan in (
            StepPlan(precision=FP32),
            StepPlan(precision=BF16, channels_last=False),
            StepPlan(precision=FP32, threads=threads + 1),
        ):
            assert 0 < trials.seconds(plan) < math.inf
            assert 0 < trials.seconds(plan) < math.inf
            trials.leave(plan)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(value.grad is not None for value in network.parameters())


def test_a_trial_that_cannot_be_made_is_infinite_and_the_next_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: SingleEngine, *arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    with StepTrials(setting(tiny()), 2) as trials:
        with monkeypatch.context() as patched:
            patched.setattr(SingleEngine, "accumulate", exhausted)
            assert trials.seconds(StepPlan(precision=FP32)) == math.inf
        assert trials.seconds(StepPlan(precision=FP32)) < math.inf


def test_a_trial_whose_compilation_fails_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.training.trials.Compiler", lambda cache: Compiler(backend=_raising))
    with StepTrials(setting(tiny()), 2) as trials:
        assert trials.seconds(StepPlan(precision=FP32, compile=True)) == math.inf
        assert trials.seconds(StepPlan(precision=FP32)) < math.inf


def _raising(graph: object, inputs: object) -> None:
    raise RuntimeError("this backend never works")


def test_noise_is_a_whole_batch_with_as_many_boxes_as_asked_for() -> None:
    batch = noise(2, setting(tiny()))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.valid.sum(1).tolist() == [3, 3]
    assert bool((batch.boxes[~batch.valid] == 0).all())
    boxes = batch.boxes[batch.valid]
    assert bool(((boxes >= 0) & (boxes <= 64)).all())
    assert bool((boxes[:, 2:] > boxes[:, :2]).all())
    first = batch.channels_first()
    assert first.images.is_contiguous()
    assert torch.equal(first.images, batch.images)
