"""Answer of a search: the configuration as a file to train from, the page, and what was found, in sentences."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paceline.options import TrainOptions
from paceline.records import RunConfig, write_atomically
from paceline.tuning.study import ENDING, REASON

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from paceline.tuning.outcome import Objective
    from paceline.tuning.sources import Confirmed
    from paceline.tuning.study import Study


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What a search has found."""

    folder: Path
    best: Path
    """YAML file that `paceline train --config` takes."""
    page: Path
    values: Mapping[str, Any]
    """The searched options with the values of the answer."""
    value: float
    """The answer by the search's measure."""
    defaults_value: float | None
    """The defaults by the same; None where their trial did not end."""
    confirmed: tuple[Confirmed, ...] = ()
    """With other seeds, best mean first."""
    num_trials: int = 0
    summary: tuple[str, ...] = field(default=())
    """The answer in sentences."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a search knows when it ends, or is ended."""

    study: Study
    folder: Path
    objective: Objective
    base: Mapping[str, Any]
    """Flat options of all trials."""
    title: str
    """Of the page."""
    confirmed: list[Confirmed]
    """Best mean first; empty where nothing was confirmed."""

    def write(self) -> TuneResult | None:
        """Write the configuration and the page; None where no trial has ended well, so that there is none."""
        from paceline.tuning.page import draw_page

        study, folder, confirmed = self.study, self.folder, self.confirmed
        best, defaults = study.best(1), study.defaults()
        defaults_value = None if defaults is None else defaults.value
        page = folder / "report.html"
        summary: tuple[str, ...] = ("No trial has ended well so far.",)
        result = None
        if best:
            answer = confirmed[0].finalist if confirmed and confirmed[0].values else None
            number = answer.number if answer else best[0].number
            values = dict(answer.values) if answer else dict(best[0].params)
            trial = next(trial for trial in study.trials if trial.number == number)
            summary = _sentences(self.objective, number, trial.value or 0.0, defaults_value, confirmed)
            if self.objective.within_s is not None:
                budget = f"time={self.objective.within_s:g}s"
                summary += (
                    f"Each trial trained with {budget}; to repeat the measure: "
                    f"paceline train --config {folder / 'best.yaml'} {budget}",
                )
            write_atomically(folder / "best.yaml", self._configuration(values, summary))
            result = TuneResult(
                folder=folder,
                best=folder / "best.yaml",
                page=page,
                values=values,
                value=trial.value or 0.0,
                defaults_value=defaults_value,
                confirmed=tuple(confirmed),
                num_trials=study.num_started(),
                summary=summary,
            )
        write_atomically(page, draw_page(study, title=self.title, summary=summary, confirmed=confirmed).encode())
        return result

    def _configuration(self, values: Mapping[str, Any], summary: tuple[str, ...]) -> bytes:
        """Options of a run with the answer, what concerned the search alone left out: its time, and that of trials."""
        flat = {**self.base, **values, "time": "", "resume": "", "device": "auto"}
        run = RunConfig()
        flat |= {"project": str(run.project), "name": run.name, "exist_ok": run.exist_ok}
        text = TrainOptions.from_flat(flat).to_yaml()
        return "".join(f"# {line}\n" for line in summary).encode() + text.encode()


def why_none(study: Study) -> str:
    """Say for what most of the trials have failed, or what to do where none has."""
    reasons = [str(trial.user_attrs[REASON]) for trial in study.trials if trial.user_attrs.get(ENDING) == "failed"]
    return f"most failed for this: {statistics.mode(reasons).rstrip('.')}. " if reasons else "give them more time. "


def _sentences(
    objective: Objective, number: int, value: float, defaults: float | None, confirmed: list[Confirmed]
) -> tuple[str, ...]:
    lines = [f"Best by {objective}: trial {number} with {value:.4f}"]
    lines[0] += "." if defaults is None else f"; the defaults have {defaults:.4f}."
    if confirmed and confirmed[0].values:
        best = confirmed[0]
        usual = next((entry for entry in confirmed if entry.finalist.is_defaults), None)
        lines.append(
            f"With {len(best.values)} other seeds it has {best.mean:.4f} ± {best.spread:.4f} (mean, standard deviation)"
            + (f"; the defaults {usual.mean:.4f} ± {usual.spread:.4f}." if usual and usual is not best else ".")
        )
        if best.finalist.is_defaults:
            lines.append("The defaults are the best of the confirmed configurations, so they are the answer.")
    return tuple(lines)
