"""Launching: values go there and back whole, from everywhere, and mistakes come back as what they are."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from paceline.errors import UserError
from paceline.parallel.config import LimitsConfig
from paceline.parallel.fault import RankError
from paceline.parallel.launch import launch, physical_cores
from paceline.parallel.process_group import joined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(autouse=True, scope="module")
def _by_value() -> Iterator[None]:
    """Let the functions of this module travel, which the ranks cannot import."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def meet(change: Callable[[int], int], log: Path, *, unequal: bool = False) -> tuple[list[object], int]:
    with joined(backend="gloo", limits=LimitsConfig()) as group:
        rank = group.rank.rank
        with group.first_on_node("index"), log.open("a") as stream:
            stream.write(f"{rank}")
        name = group.share("name", lambda: f"made by {rank}")
        some, none = group.any("some", rank == 1), group.any("none", False)
        total = torch.full((2,), float(rank + 1))
        dist.all_reduce(total)
        group.agree("start", {"code": str(rank) if unequal else "same", "data": "same"})
        gathered: list[object] = [None] * group.rank.world
        dist.all_gather_object(gathered, (change(rank), name, (some, none), total.tolist()))
        return gathered, torch.get_num_threads()


def test_two_ranks_work_together_and_the_first_one_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    offset = 40
    gathered, threads = launch(2, meet, lambda rank: rank + offset, tmp_path / "order")
    said = ("made by 0", (True, False), [3.0, 3.0])
    assert gathered == [(40, *said), (41, *said)]
    assert (tmp_path / "order").read_text() == "01"
    assert threads == max(1, physical_cores() // 2)


def test_what_differs_between_ranks_is_named_with_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"same code \(rank 1 on .*\); make") as caught:
        launch(2, meet, abs, tmp_path / "order", unequal=True)
    assert "data" not in str(caught.value)


def test_a_failure_before_the_group_is_one_sentence() -> None:
    def fail() -> None:
        raise ZeroDivisionError("nothing to share")

    with pytest.raises(RankError, match=r"rank [01] on .* failed with ZeroDivisionError: nothing to share") as caught:
        launch(2, fail)
    assert "Traceback" in caught.value.fault.details


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(UserError, match="cannot be pickled"):
        launch(2, print, threading.Lock())


SCRIPT = """
    from paceline.parallel.launch import launch

    class Memory:
        factor = 7
        remember = lambda self, rank: rank * self.factor

    memory = Memory()
    print("loaded")

    def work(memory):
        import os
        return memory.remember(int(os.environ["RANK"]) + 1)

    print("answer", launch(2, work, memory))
"""


@pytest.mark.slow
def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    run = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["loaded", "answer", "7"]


@pytest.mark.slow
def test_a_notebook_keeps_its_functions(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    cells = [nbformat.v4.new_code_cell(part) for part in textwrap.dedent(SCRIPT).split('print("loaded")')]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python"}
    client.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "answer 7" in cells[-1].outputs[-1]["text"]
