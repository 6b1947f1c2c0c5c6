"""Trials: a live table of a search on a terminal, and one line per finished trial where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from paceline.cli.wording import duration

if TYPE_CHECKING:
    from paceline.tuning.search import Row

_MOST_ROWS = 16
_STYLES = {"complete": "green", "pruned": "yellow", "diverged": "red", "failed": "red", "running": "bold"}


class TrialTable:
    """Shows the rows of a search: those that run, those that ended last, and the best; use it as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = Console(highlight=False) if console is None else console
        self._rows: dict[str, Row] = {}
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal and not self._console.is_jupyter:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._console.print(self.table())

    def show(self, row: Row) -> None:
        """Take a change."""
        self._rows[row.key] = row
        if self._live is not None:
            self._live.update(self.table(), refresh=True)
        elif row.state != "running":
            reached = "" if row.ap is None else f", AP {row.ap:.4f}"
            why = f" ({row.reason})" if row.reason else ""
            print(
                f"trial {row.key} {row.state}{reached}, epoch {row.epoch} of {row.epochs}, {duration(row.seconds)}, "
                f"{row.device}{why}",
                file=self._console.file,
                flush=True,
            )

    def table(self) -> Table:
        """Lay out the rows."""
        best = self._best()
        table = Table(title=f"{len(self._rows)} trials", title_justify="left")
        for heading in ("trial", "state", "epoch", "AP", "time", "device", "reason"):
            table.add_column(heading, justify="right" if heading in {"epoch", "AP", "time"} else "left")
        for row in self._shown(best):
            mark = " *" if best is not None and row.key == best.key else ""
            table.add_row(
                row.key + mark,
                f"[{_STYLES.get(row.state, 'dim')}]{row.state}[/]",
                f"{row.epoch}/{row.epochs}",
                "" if row.ap is None else f"{row.ap:.4f}",
                duration(row.seconds),
                row.device,
                escape(row.reason),
            )
        return table

    def _shown(self, best: Row | None) -> list[Row]:
        rows = [*self._rows.values()]
        chosen = [row for row in rows if row.state == "running" or (best is not None and row.key == best.key)]
        others = [row for row in rows if row not in chosen]
        room = max(_MOST_ROWS - len(chosen), 0)
        return sorted([*chosen, *others[len(others) - min(room, len(others)) :]], key=lambda row: row.key)

    def _best(self) -> Row | None:
        complete = [row for row in self._rows.values() if row.state == "complete" and row.ap is not None]
        return max(complete, key=lambda row: row.ap or 0.0, default=None)
