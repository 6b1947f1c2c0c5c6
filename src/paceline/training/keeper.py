"""The keeper: writes a run's weights, resume point and metrics, and reads them back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from paceline.errors import UserError
from paceline.parallel.shards import load_whole_state
from paceline.prefix import with_prefix, without_prefix
from paceline.records import EpochRecord, EvaluationRecord, to_jsonable
from paceline.training.background import Errand
from paceline.training.checkpoint import (
    ResumePoint,
    WeightsHeader,
    load_header,
    load_optimizer_tensors,
    load_resume_point,
    load_weights,
    optimizer_tensors,
    save_resume_point,
    save_weights,
)
from paceline.training.snapshot import HostSnapshot
from paceline.training.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from paceline.parallel.engine import Engine
    from paceline.records import LateEvaluationRecord, RunFolder
    from paceline.training.ema import Ema
    from paceline.training.optimizer import Optimizer


log = logging.getLogger("paceline")

BEST = "best"
"""Prefix of the best weights in a snapshot; they are in no resume point."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The weights that an evaluation found better than all before."""

    epoch: int
    evaluation: EvaluationRecord
    tensors: Mapping[str, Tensor] | None = None
    """None where they are the average as it is now."""


@dataclass(kw_only=True)
class WeightsKeeper:
    """Owns nothing that it writes: it is given the objects of the run and knows where their state belongs."""

    run: RunFolder
    model: str
    names: tuple[str, ...]
    imgsz: int
    save_period: int
    engine: Engine
    ema: Ema
    optimizer: Optimizer
    writes: bool = True
    """Whether this rank writes files; the others only give their part of what is written."""
    awaited: dict[str, Tensor] = field(default_factory=dict, init=False)
    """See `restore`."""
    _snapshot: HostSnapshot = field(default_factory=HostSnapshot, init=False)
    _errand: Errand[None] | None = field(default=None, init=False)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.path

    def save(
        self,
        state: TrainingState,
        evaluation: EvaluationRecord | None,
        *,
        best: Best | None = None,
        awaiting: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Have the checkpoint of a finished epoch written: new best weights first, then resume point, then the others.

        Every rank has to call it. It returns when the state has been copied and may change; the files follow, and
        `wait` comes before the next call. So a kill at any moment leaves the last whole resume point, with best
        weights that are not older than it says.

        evaluation: figures of the average as it is now.
        awaiting: weights that are being evaluated, where they are older than the average; a resumed run asks for them.
        """
        tensors = self._state_of_all()
        if not self.writes:
            return
        if best is not None and best.tensors is not None:
            tensors |= with_prefix(BEST, best.tensors)
        tensors |= with_prefix("awaiting", awaiting or {})
        assert self._errand is None, "the snapshot before is still being written"
        copies = self._snapshot.take(tensors)
        writes = []
        if best is not None:
            weights = without_prefix("ema" if best.tensors is None else BEST, copies)
            writes.append(partial(self._save_weights, "best", weights, best.epoch, best.evaluation))
        point = ResumePoint(
            tensors={key: value for key, value in copies.items() if not key.startswith(f"{BEST}.")},
            values={"state": state.to_json(), "ema_updates": self.ema.updates},
        )
        writes.append(partial(save_resume_point, self.run.weights / "resume.safetensors", point))
        stems = ["last"]
        if self.save_period > 0 and state.epoch % self.save_period == 0:
            stems.append(f"epoch{state.epoch}")
        average = without_prefix("ema", copies)
        writes += [partial(self._save_weights, stem, average, state.epoch, evaluation) for stem in stems]

        def write() -> None:
            self._snapshot.wait()
            for each in writes:
                each()

        self._errand = Errand("checkpoint", write)

    def wait(self) -> None:
        """Wait until all files are written. Raises UserError where they could not be."""
        if self._errand is not None:
            self._errand.join()  # an interrupted wait leaves the errand for `close`
            errand, self._errand = self._errand, None
            errand.result()

    def close(self) -> None:
        """Wait like `wait` when the run ends for another reason, which an error of the disk must not hide."""
        try:
            self.wait()
        except UserError as error:
            log.error("The last checkpoint was not written. %s", error)

    def _save_weights(
        self, stem: str, tensors: Mapping[str, Tensor], epoch: int, evaluation: EvaluationRecord | None
    ) -> None:
        header = WeightsHeader(
            model=self.model,
            names=self.names,
            imgsz=self.imgsz,
            epoch=epoch,
            metrics={} if evaluation is None else to_jsonable(evaluation) | {"per_class": None},
        )
        save_weights(self.run.weights / f"{stem}.safetensors", tensors, header)

    def record(self, record: EpochRecord | LateEvaluationRecord) -> None:
        """Append to the metrics."""
        if self.writes:
            self.run.append("epoch" if isinstance(record, EpochRecord) else "evaluation", record)

    def best_evaluation(self, state: TrainingState) -> EvaluationRecord | None:
        """Figures of the best epoch so far, from the metrics; the figures per class are left out.

        Lines of epochs that the state knows nothing of are those that a killed run has to train again.
        """
        best: EvaluationRecord | None = None
        for line in self.run.epochs():
            values = line.get("evaluation")
            if values and line["epoch"] <= state.best_epoch and (best is None or values["ap"] > best.ap):
                best = EvaluationRecord(**(values | {"per_class": ()}))
        return best

    def _state_of_all(self) -> dict[str, Tensor]:
        parts = self.engine.parts
        return parts.whole(
            with_prefix("network", self.engine.network.state_dict())
            | with_prefix("ema", self.ema.network.state_dict())
            | with_prefix("optimizer", optimizer_tensors(self.optimizer, self.engine.network, parts.leaf))
            | with_prefix("engine", self.engine.pending())
        )

    def restore(self) -> TrainingState:
        """Put the newest resume point back into the objects of the run, in place; returns its counters.

        `awaited` then holds the weights whose evaluation it was waiting for, where they are not its average; and
        last.safetensors is written if the run was killed before it was.
        """
        point = load_resume_point(self.run.weights / "resume.safetensors")
        load_whole_state(self.engine.network, without_prefix("network", point.tensors))
        load_whole_state(self.ema.network, without_prefix("ema", point.tensors))
        self.ema.updates = point.values["ema_updates"]
        load_optimizer_tensors(
            self.optimizer, self.engine.network, without_prefix("optimizer", point.tensors), self.engine.parts.leaf
        )
        self.engine.load_pending(without_prefix("engine", point.tensors))
        self.awaited = without_prefix("awaiting", point.tensors)
        state = TrainingState.from_json(point.values["state"])
        if self.writes and not self._has_last(state.epoch):
            self._save_weights("last", without_prefix("ema", point.tensors), state.epoch, None)
        return state

    def load_best(self, network: nn.Module) -> None:
        """Put the best weights so far into a network that is laid out as the average is."""
        tensors, _ = load_weights(self.run.weights / "best.safetensors")
        load_whole_state(network, tensors)

    def _has_last(self, epoch: int) -> bool:
        try:
            return load_header(self.run.weights / "last.safetensors").epoch == epoch
        except UserError:
            return False
