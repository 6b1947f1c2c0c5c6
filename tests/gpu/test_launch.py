"""Launches on a GPU: those that are made again are those that were made, and a plan without kernels starts none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline import triton_kernels
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.training.config import OptimConfig
from paceline.training.optim import plan_optimizer
from paceline.training.plan import StepPlan
from paceline.training.precision import Precision
from paceline.training.schedule import Rates
from paceline.training.trials import StepTrials, TrialSetting, noise
from paceline.training.understudy import Cast, understudy

pytestmark = pytest.mark.gpu

RATES = Rates(lr=0.01, bias_lr=0.01, momentum=0.9)


@pytest.fixture
def made() -> TrialSetting:
    device = torch.device("cuda", torch.cuda.current_device())
    if not triton_kernels.usable(device):
        pytest.skip("no kernels here")
    torch.manual_seed(0)
    cast = Cast(
        network=build_model("yolo11n", 3).to(device),
        criterion=DetectionLoss(LossConfig(), 3),
        optimizer=plan_optimizer(OptimConfig(optimizer="SGD"), num_classes=3, updates=20_000, effective_batch=8),
        freeze=0,
        clip=10.0,
    )
    return TrialSetting(cast=cast, device=device, imgsz=160, boxes=6, padded_boxes=8)


def trained(made: TrialSetting, steps: int = 4) -> list[float]:
    step, batch = understudy(made.cast, Precision.named("bf16")), noise(8, made)
    return [float(step(batch, RATES, completes=True).sums.total) for _ in range(steps)]


def test_launches_of_ours_do_what_tritons_do(made: TrialSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training whose kernels are started again by their keys, and one where Triton starts each."""
    from paceline import triton_launch

    ours = trained(made)
    launchers = [start for start in triton_kernels._launchers.values() if isinstance(start, triton_launch.Launcher)]
    assert len(launchers) > 20
    assert all(launcher._known for launcher in launchers)
    monkeypatch.setattr(triton_launch, "_is_known", lambda: False)
    monkeypatch.setattr(triton_kernels, "_launchers", {})
    theirs = trained(made)
    assert not any(isinstance(start, triton_launch.Launcher) for start in triton_kernels._launchers.values())
    assert ours[0] == theirs[0], "all that is forward"
    assert ours == pytest.approx(theirs, rel=1e-2), "cuDNN may add up gradients in another order"


def test_a_tensor_elsewhere_is_refused_though_its_like_was_launched(made: TrialSetting) -> None:
    from paceline.models.operations.fused_joint import product

    weight = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    there = torch.ones(1, 16, 4, 4, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        assert torch.equal(product(weight, [there]).float(), torch.full((1, 16, 4, 4), 16.0, device="cuda"))
    with pytest.raises(RuntimeError, match="cannot be started"):
        product(weight.cpu(), [there])


def test_a_plan_without_kernels_starts_none_and_takes_the_same_step(
    made: TrialSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(made, steps=1)
    started: list[Any] = []
    for room in (
        "models.operations.fused_norm",
        "models.operations.fused_joint",
        "models.operations.narrow_conv",
        "losses.fused",
    ):
        monkeypatch.setattr(f"paceline.{room}.start_kernel", lambda *given, **_: started.append(given))
    with triton_kernels.kernels_left_out():
        assert trained(made, steps=1) == pytest.approx(expected, rel=2e-2)
    with StepTrials(made, 8) as trials:
        assert trials.seconds(StepPlan(precision=Precision.named("bf16"), kernels=False)) < 60
    assert not started
