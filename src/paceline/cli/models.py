"""`paceline models`: the networks, with their size, arithmetic and published accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.errors import UserError
from paceline.models.catalogue import CATALOGUE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

_HELP = "usage: paceline models\n\nList the networks that `model=` names, with their size and published accuracy.\n"

_FOOTNOTE = """
With 80 classes; GFLOPs for one image of 640 x 640 px; COCO AP50-95 in percent, as
published by the networks' authors for their own weights. `paceline train model=NAME`
starts from fresh weights."""


def run_models(words: Sequence[str]) -> int:
    """Print the table of networks."""
    if list(words) in (["-h"], ["--help"]):
        print(_HELP, end="")
        return 0
    if words:
        raise UserError(f"models takes no options, but was given {words[0]}; leave it out.")
    from rich.console import Console

    print_models(Console(highlight=False))
    return 0


def print_models(console: Console) -> None:
    """Print one row per network."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bright_black")
    table.add_column("model", style="bold")
    for heading in ("parameters", "fused", "GFLOPs", "COCO AP"):
        table.add_column(heading, justify="right")
    family = CATALOGUE[0].family
    for info in CATALOGUE:
        if info.family != family:
            table.add_row()
            family = info.family
        row = (f"{info.params:,}", f"{info.params_fused:,}", f"{info.gflops:.1f}", f"{info.published_ap:.1f}")
        table.add_row(info.name, *row)
    console.print(table)
    console.print(_FOOTNOTE, soft_wrap=True)
