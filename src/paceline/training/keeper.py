"""The keeper: writes a run's weights, resume point and metrics, and reads them back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.parallel.shards import load_whole_state
from paceline.prefix import with_prefix, without_prefix
from paceline.records import EvaluationRecord, to_jsonable
from paceline.training.checkpoint import (
    ResumePoint,
    WeightsHeader,
    load_optimizer_tensors,
    load_resume_point,
    optimizer_tensors,
    save_resume_point,
    save_weights,
)
from paceline.training.state import TrainingState

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from paceline.parallel.engine import Engine
    from paceline.records import EpochRecord, RunFolder
    from paceline.training.ema import Ema


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
    optimizer: torch.optim.Optimizer
    writes: bool = True
    """Whether this rank writes files; the others only give their part of what is written."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.path

    def save(self, state: TrainingState, evaluation: EvaluationRecord | None, *, is_best: bool) -> None:
        """Write the checkpoint of a finished epoch: resume point first, then weights. Every rank has to call it."""
        self._save_resume_point(state)
        tensors = self.engine.parts.whole(self.ema.network.state_dict())
        if not self.writes:
            return
        header = WeightsHeader(
            model=self.model,
            names=self.names,
            imgsz=self.imgsz,
            epoch=state.epoch,
            metrics={} if evaluation is None else to_jsonable(evaluation) | {"per_class": None},
        )
        stems = ["last"]
        if is_best:
            stems.append("best")
        if self.save_period > 0 and state.epoch % self.save_period == 0:
            stems.append(f"epoch{state.epoch}")
        for stem in stems:
            save_weights(self.run.weights / f"{stem}.safetensors", tensors, header)

    def record(self, record: EpochRecord) -> None:
        """Append the epoch to the metrics."""
        if self.writes:
            self.run.append("epoch", record)

    def best_evaluation(self) -> EvaluationRecord | None:
        """Figures of the best epoch so far, from the metrics; the figures per class are left out."""
        best: EvaluationRecord | None = None
        for line in self.run.records("epoch"):
            values = line.get("evaluation")
            if values and (best is None or values["ap"] > best.ap):
                best = EvaluationRecord(**(values | {"per_class": ()}))
        return best

    def _save_resume_point(self, state: TrainingState) -> None:
        parts = self.engine.parts
        tensors = parts.whole(
            with_prefix("network", self.engine.network.state_dict())
            | with_prefix("ema", self.ema.network.state_dict())
            | with_prefix("optimizer", optimizer_tensors(self.optimizer, self.engine.network, parts.leaf))
            | with_prefix("engine", self.engine.pending())
        )
        if not self.writes:
            return
        values = {"state": state.to_json(), "ema_updates": self.ema.updates}
        save_resume_point(self.run.weights / "resume.safetensors", ResumePoint(tensors=tensors, values=values))

    def restore(self) -> TrainingState:
        """Put the newest resume point back into the objects of the run, in place; returns its counters."""
        point = load_resume_point(self.run.weights / "resume.safetensors")
        load_whole_state(self.engine.network, without_prefix("network", point.tensors))
        load_whole_state(self.ema.network, without_prefix("ema", point.tensors))
        self.ema.updates = point.values["ema_updates"]
        load_optimizer_tensors(
            self.optimizer, self.engine.network, without_prefix("optimizer", point.tensors), self.engine.parts.leaf
        )
        self.engine.load_pending(without_prefix("engine", point.tensors))
        return TrainingState.from_json(point.values["state"])
