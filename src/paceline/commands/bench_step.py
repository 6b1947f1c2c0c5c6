"""The step under the stopwatch: whole, by part, and beside the same share of the batch with nothing exchanged."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.ledger import CudaClock, Ledger
from paceline.parallel.build import num_ranks
from paceline.parallel.gather import from_first, largest
from paceline.planning.roofline import PARTS
from paceline.planning.spread import Spread
from paceline.planning.stopwatch import Stopwatch
from paceline.training.config import OptimConfig
from paceline.training.ema import Ema
from paceline.training.graphed import graphed
from paceline.training.optim import LONG_RUN_UPDATES, build_optimizer, plan_optimizer
from paceline.training.schedule import Rates
from paceline.training.step import EagerStep

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from paceline.batch import Batch
    from paceline.parallel.engine import Engine
    from paceline.training.graphed import Capture
    from paceline.training.step import Step

RATES = Rates(lr=1e-4, bias_lr=1e-4, momentum=0.937)
"""Low enough that a batch of noise does not make the weights diverge."""
WARM_UP_STEPS = 3
STEPS_BETWEEN_WAITS = 4
"""Steps whose parts are timed before the host waits for the device, which would otherwise run dry."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of the step, and of its parts."""

    whole_s: Spread
    parts_s: dict[str, Spread]
    """By part; `exchange` too where gradients travel apart from the backward pass."""
    alone_s: Spread | None
    waiting_share: Spread | None


class _Switch:
    """A device's clock that can be turned off, so that nothing is recorded within the steps that are timed whole."""

    def __init__(self, device: torch.device) -> None:
        self._clock = CudaClock(device, every=1)
        self.on = False

    def start(self, name: str) -> object:
        return self._clock.start(name) if self.on else None

    def stop(self, mark: object) -> None:
        self._clock.stop(mark)

    def read_ms(self) -> dict[str, float]:
        return self._clock.read_ms()


class StepBench:
    """A training step on one batch, again and again; the weights move as they would in training."""

    def __init__(
        self,
        engine_of: Callable[[Ledger], Engine],
        batch: Batch,
        device: torch.device,
        *,
        capture: Capture | None = None,
        prepare: Callable[[], None] | None = None,
        sampled: bool | None = None,
    ) -> None:
        """Make a step of what `engine_of` builds around a network, and warm it up.

        prepare: called when the average has been made of the network as it is, to compile it.
        capture: records the whole step; its parts are then those of the same step without.
        sampled: whether parts are timed by the device's events rather than by the host; None where it is a GPU.
        """
        sampled = device.type == "cuda" if sampled is None else sampled
        self.batch = batch
        self._device = device
        self._switch = _Switch(device) if sampled else None
        self._ledger = Ledger(device_clock=self._switch)
        with capture.aside() if capture is not None else nullcontext():
            engine = engine_of(self._ledger)
        self.engine = engine
        engine.network.train()
        self._by_part = step_of(engine, self._ledger)
        if prepare is not None:
            prepare()
        self.step: Step = graphed(self._by_part, capture, largest=largest if num_ranks() > 1 else None)
        for _ in range(WARM_UP_STEPS):
            self.take()

    def take(self, batch: Batch | None = None) -> None:
        """Take a step."""
        self.step(batch or self.batch, RATES, completes=True)

    def measure(self, budget_s: float, *, alone: StepBench | None = None) -> StepTimes:
        """Time steps for about `budget_s`; with several ranks all of them come here."""
        parts: dict[str, list[float]] = defaultdict(list)

        def take_by_part() -> None:
            self._ledger.lap()
            steps = 1 if self._switch is None else STEPS_BETWEEN_WAITS
            for _ in range(steps):
                self._take_by_part()
            for name, seconds in self._lap().items():
                parts[name].append(seconds / (1 if self._switch else steps))

        calls: dict[str, Callable[[], object]] = {}
        if alone is not None:  # then a step that is not counted, in which the ranks come together again
            calls |= {"alone": alone.take, "together": self.take}
        if self._switch is None and not self.is_recorded:  # the host's clock costs nothing: the same steps give both
            calls["whole"] = take_by_part
        else:
            calls |= {"whole": self.take, "parts": take_by_part}
        found = Stopwatch(self._device).in_turn(calls, budget_s=budget_s, agree=from_first)
        whole = Spread.of(found["whole"])
        parts_s = {name: Spread.of(parts[name]) for name in (*PARTS, "exchange") if name in parts}
        if alone is None:
            return StepTimes(whole_s=whole, parts_s=parts_s, alone_s=None, waiting_share=None)
        shares = [max(1 - a / w, 0.0) for a, w in zip(found["alone"], found["whole"], strict=True)]
        return StepTimes(
            whole_s=whole, parts_s=parts_s, alone_s=Spread.of(found["alone"]), waiting_share=Spread.of(shares)
        )

    @property
    def is_recorded(self) -> bool:
        """Whether the step is a graph, in which no parts can be told apart."""
        return self.step is not self._by_part

    def _take_by_part(self) -> None:
        if self._switch is not None:
            self._switch.on = True
        self._by_part(self.batch, RATES, completes=True)
        if self._switch is not None:
            self._switch.on = False

    def _lap(self) -> dict[str, float]:
        """Take the seconds of each part since the last lap."""
        lap = self._ledger.lap()
        if self._switch is None:
            return lap.spans_s
        return {name: ms / 1e3 for name, ms in lap.device_ms.items()}


def step_of(engine: Engine, ledger: Ledger) -> EagerStep:
    """Put optimiser and moving average to an engine: SGD with momentum, which long runs take."""
    plan = plan_optimizer(OptimConfig(), num_classes=1, updates=LONG_RUN_UPDATES + 1, effective_batch=OptimConfig().nbs)
    average = Ema(engine.network, average=engine.parts.twin())
    return EagerStep(engine, build_optimizer(plan, engine.network, engine.parts.leaf), average, ledger)
