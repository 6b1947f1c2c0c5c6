"""Steps of a small detector, for the tests of steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from batches import NUM_CLASSES, make_batch
from torch import nn

from paceline.ledger import Ledger
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.parallel.single import SingleEngine
from paceline.training.config import OptimConfig
from paceline.training.ema import Ema
from paceline.training.optim import build_optimizer, plan_optimizer
from paceline.training.schedule import Schedule
from paceline.training.step import EagerStep

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.batch import Batch
    from paceline.training.schedule import Rates
    from paceline.training.step import Step


class SmallDetector(nn.Module):
    """Three levels of one convolution each; maps B3HW to BA(4R) and BAK."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, width, side, stride=side, bias=False), nn.BatchNorm2d(width), nn.SiLU())
            for before, side in ((3, 8), (width, 2), (width, 2))
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, 4 * 16 + NUM_CLASSES, 1) for _ in range(3))
        with torch.no_grad():
            for head in self.heads:
                head.bias[: 4 * 16] = -torch.linspace(0, 10, 16).repeat(4)  # boxes of about three strides

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw sides and scores."""
        found = []
        for level, head in zip(self.levels, self.heads, strict=True):
            images = level(images)
            found.append(head(images).flatten(2).transpose(1, 2))
        raw, scores = torch.cat(found, dim=1).split([4 * 16, NUM_CLASSES], dim=-1)
        return raw, scores


def make_step(
    optimizer: str = "SGD",
    *,
    network: nn.Module | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    amp_dtype: torch.dtype | None = None,
    clip: float = 1.0,
    loss_scale: float = 1.0,
    ledger: Ledger | None = None,
    fixed_shapes: bool = True,
) -> EagerStep:
    """A step of a network with random weights, the same each time."""
    if network is None:
        torch.manual_seed(0)
        network = SmallDetector()
    network = network.to(device, dtype).train()
    criterion = DetectionLoss(LossConfig(), NUM_CLASSES, fixed_shapes=fixed_shapes)
    ledger = ledger or Ledger()
    engine = SingleEngine(network, criterion, amp_dtype=amp_dtype, clip=clip, ledger=ledger, loss_scale=loss_scale)
    engine.loss_scale.adaptive = loss_scale != 1.0  # float16 alone does so by itself
    made = build_optimizer(schedule(optimizer).plan, network)
    return EagerStep(engine, made, Ema(network, ramp_updates=10), ledger)


def schedule(optimizer: str = "SGD", *, batch: int = 16) -> Schedule:
    """A schedule whose warm-up takes 20 steps of the first epoch, from 1 batch per update to 64 / batch."""
    config = OptimConfig(optimizer=optimizer, lr0=0.01, warmup_epochs=1.0)  # type: ignore[arg-type]
    plan = plan_optimizer(config, num_classes=NUM_CLASSES, updates=20_000, effective_batch=64)
    return dataclasses.replace(
        Schedule.from_config(config, plan, batch=batch, steps_per_epoch=200.0), warmup_epochs=1.0
    )


@dataclass(frozen=True)
class Work:
    """One call of a step."""

    batch: Batch
    rates: Rates
    completes: bool


def works(count: int, optimizer: str = "SGD", *, device: str = "cpu", boxes: tuple[int, ...] = (4, 7)) -> list[Work]:
    """What a loop would ask for over a warm-up; the room for boxes changes from batch to batch."""
    plan, made, since = schedule(optimizer), [], 0
    for number in range(1, count + 1):
        place = number / 20
        since += 1
        completes = since >= plan.accumulation(place)
        batch = make_batch(3, seed=number, boxes=boxes[number % len(boxes)]).to(device)
        made.append(Work(batch, plan.rates(place, 10), completes))
        since = 0 if completes else since
    return made


def run(step: Step, asked: list[Work]) -> list[Tensor]:
    """Take the steps; returns the sums, and whether an update was not finite, -1 where there was none."""
    said = []
    for work in asked:
        outcome = step(work.batch, work.rates, completes=work.completes)
        sums = outcome.sums
        verdict = torch.full_like(sums.box, -1.0) if outcome.not_finite is None else outcome.not_finite
        said.append(torch.stack([sums.box, sums.cls, sums.dfl, sums.normaliser, verdict.to(sums.box.dtype)]))
    return said


def everything(step: EagerStep) -> dict[str, Any]:
    """Copies of all that a step changes."""
    gradients = [parameter.grad for parameter in step.engine.network.parameters()]
    return {
        "state": [value.detach().clone() for value in step.state()],
        "gradients": [None if value is None else value.clone() for value in gradients],
        "random": torch.get_rng_state(),
    }
