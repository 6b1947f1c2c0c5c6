"""The bar of images: on a terminal it counts and goes away, elsewhere it is silent."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from paceline.cli.bar import image_bar


@pytest.mark.parametrize("terminal", [True, False])
def test_it_counts_on_a_terminal_alone(terminal: bool) -> None:
    stream = io.StringIO()
    with image_bar("packing", Console(file=stream, force_terminal=terminal, width=80)) as show:
        for done in range(1, 6):
            show(done, 5)
    assert ("packing" in stream.getvalue()) == terminal
    assert ("5/5" in stream.getvalue()) == terminal


def test_an_error_comes_through() -> None:
    with pytest.raises(KeyError), image_bar("packing", Console(file=io.StringIO(), force_terminal=True)):
        raise KeyError
