"""The figures of an evaluation as a table on the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paceline.cli.wording import figure

if TYPE_CHECKING:
    from paceline.records import ClassRecord, EvaluationRecord

_MOST_CLASSES = 80


def print_figures(record: EvaluationRecord, console: Console | None = None, *, with_classes: bool = True) -> None:
    """Print the figures over all classes and, `with_classes`, of each, then COCO's by size of the objects."""
    console = Console(highlight=False) if console is None else console
    table = Table(box=None, pad_edge=False, header_style="bright_black")
    table.add_column("class")
    for heading in ("images", "boxes", "P", "R", "AP50", "AP"):
        table.add_column(heading, justify="right")
    table.add_row("all", *_cells(record), style="bold")
    classes = record.per_class if with_classes and len(record.per_class) > 1 else ()
    for entry in classes[:_MOST_CLASSES]:
        table.add_row(escape(entry.name), *_cells(entry))
    console.print(table)
    if len(classes) > _MOST_CLASSES:
        console.print(f"... and {len(classes) - _MOST_CLASSES} more classes")
    sizes = (("small", record.ap_small), ("medium", record.ap_medium), ("large", record.ap_large))
    by_size = ", ".join(f"{name} {figure(value)}" for name, value in sizes)
    console.print(
        f"AP75 {figure(record.ap75)}; AP by size: {by_size}; AR at 100 boxes {figure(record.ar100)}", soft_wrap=True
    )
    console.print(
        f"P and R at score {record.threshold:.3f}, where their F1 is best: {figure(record.f1)}", soft_wrap=True
    )


def _cells(record: EvaluationRecord | ClassRecord) -> tuple[str, ...]:
    shares = (record.precision, record.recall, record.ap50, record.ap)
    return f"{record.num_images:,}", f"{record.num_boxes:,}", *(figure(value) for value in shares)
