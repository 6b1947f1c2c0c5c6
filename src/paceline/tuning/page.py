"""Page: what a search has found, as one HTML file that opens without a network."""

from __future__ import annotations

import html
import logging
import warnings
from typing import TYPE_CHECKING, Any

from paceline.tuning.study import DEVICE, ENDING, REASON, ROLE, SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import plotly.graph_objects
    from optuna.trial import FrozenTrial

    from paceline.tuning.sources import Confirmed
    from paceline.tuning.study import Study

log = logging.getLogger("paceline")

_COLOURS = {
    "complete": "#2a7f62",
    "pruned": "#c9a227",
    "diverged": "#b5462f",
    "failed": "#7a1f2b",
    "interrupted": "#8a8f98",
    "running": "#4a6fa5",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .6rem 0 } th, td { padding: .25rem .8rem; text-align: left }
th { border-bottom: 2px solid #1c2430 } td { border-bottom: 1px solid #d5dae1; font-variant-numeric: tabular-nums }
p.note { color: #55606e } .scroll { overflow-x: auto }
"""


def draw_page(study: Study, *, title: str, summary: Sequence[str], confirmed: Sequence[Confirmed]) -> str:
    """Return the page: summary, confirmation, Optuna's plots, devices over time, all trials."""
    trials = study.trials
    parts = [f"<p>{html.escape(line)}</p>" for line in summary]
    if confirmed:
        parts += ["<h2>Confirmed with other seeds</h2>", _confirmation(confirmed)]
    script: bool | str = True  # plotly's own code goes into the first figure, once
    for heading, note, figure in _figures(study, trials):
        parts.append(f"<h2>{heading}</h2><p class=note>{note}</p>")
        parts.append(figure.to_html(full_html=False, include_plotlyjs=script))
        script = False
    parts += ["<h2>All trials</h2>", _table(trials)]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def _figures(study: Study, trials: Sequence[FrozenTrial]) -> Iterable[tuple[str, str, plotly.graph_objects.Figure]]:
    from optuna import visualization
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.trial import TrialState

    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if complete:
        yield (
            "History",
            "Each point is a trial that ran to its end.",
            visualization.plot_optimization_history(study.optuna),
        )
    varied = {name for name in (complete[0].params if complete else ()) if len({t.params[name] for t in complete}) > 1}
    if len(complete) >= 4 and varied:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importances = visualization.plot_param_importances(
                    study.optuna, evaluator=PedAnovaImportanceEvaluator()
                )
            note = "Share of each option in telling good trials from others; with few trials it says little."
            yield "What mattered", note, importances
        except (RuntimeError, ValueError) as error:
            log.info("No importances are drawn: %s", error)
    if len(complete) >= 2:
        note = "One line per trial that ran to its end; drag along an axis to pick lines."
        yield "Configurations", note, visualization.plot_parallel_coordinate(study.optuna)
    if any(trial.intermediate_values for trial in trials):
        note = "AP over tenths of a second of training; lines that stop early were pruned."
        yield "While training", note, visualization.plot_intermediate_values(study.optuna)
    if any(trial.datetime_start for trial in trials):
        yield "Devices", "What each device did, and when.", _timeline(trials)


def _timeline(trials: Sequence[FrozenTrial]) -> plotly.graph_objects.Figure:
    """One bar per trial, on the line of its device."""
    import plotly.graph_objects as plots

    figure = plots.Figure()
    for ending, colour in _COLOURS.items():
        shown = [
            trial
            for trial in trials
            if trial.datetime_start and trial.datetime_complete and trial.user_attrs.get(ENDING, "running") == ending
        ]
        if shown:
            figure.add_bar(
                base=[trial.datetime_start for trial in shown],
                x=[(trial.datetime_complete - trial.datetime_start).total_seconds() * 1000 for trial in shown],  # type: ignore[operator]
                y=[trial.user_attrs.get(DEVICE, "?") for trial in shown],
                text=[f"{trial.number}" for trial in shown],
                hovertext=[_value(trial) for trial in shown],
                orientation="h",
                name=ending,
                marker={"color": colour, "line": {"color": "white", "width": 1}},
            )
    num_devices = len({trial.user_attrs.get(DEVICE) for trial in trials})
    figure.update_layout(barmode="overlay", xaxis={"type": "date"}, height=220 + 40 * num_devices)
    return figure


def _confirmation(confirmed: Sequence[Confirmed]) -> str:
    rows = ""
    for entry in confirmed:
        label = "defaults" if entry.finalist.is_defaults else f"trial {entry.finalist.number}"
        seeds = ", ".join(f"{value:.4f}" for value in entry.values)
        rows += f"<tr><td>{label}</td><td>{entry.mean:.4f}</td><td>{entry.spread:.4f}</td><td>{seeds}</td></tr>"
    head = "<tr><th>configuration</th><th>mean</th><th>standard deviation</th><th>seeds</th></tr>"
    return f"<table>{head}{rows}</table>"


def _table(trials: Sequence[FrozenTrial]) -> str:
    names = sorted({name for trial in trials for name in trial.params})
    head = "".join(
        f"<th>{html.escape(name)}</th>" for name in ("trial", "ending", "value", "s", "device", *names, "reason")
    )
    rows = []
    for trial in trials:
        attributes: dict[str, Any] = trial.user_attrs
        label = f"{trial.number}{' (defaults)' if ROLE in attributes else ''}"
        cells = [
            label,
            str(attributes.get(ENDING, trial.state.name.lower())),
            _value(trial),
            f"{attributes[SECONDS]:.0f}" if SECONDS in attributes else "",
            str(attributes.get(DEVICE, "")),
            *(_number(trial.params.get(name)) for name in names),
            str(attributes.get(REASON, "")),
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<div class=scroll><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _value(trial: FrozenTrial) -> str:
    return f"{trial.value:.4f}" if trial.value is not None else ""


def _number(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
