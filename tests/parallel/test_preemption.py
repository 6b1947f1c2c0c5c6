"""Preemption: all ranks stop at the same step, whoever was asked, and soon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from torch.distributed import HashStore

from paceline.parallel import preemption
from paceline.parallel.preemption import EVERY, Preemption

if TYPE_CHECKING:
    from collections.abc import Sequence


def run(asks: Sequence[tuple[int, int]], world: int) -> list[int]:
    """Let every rank step on a thread of its own; `asks` are (rank, step). Returns the last steps."""
    store, last = HashStore(), [0] * world

    def work(rank: int) -> None:
        own = Preemption(store, rank=rank, world=world)
        for step in range(1, 200):
            if (rank, step) in asks:
                own.ask()
            last[rank] = step
            if own.agreed(step):
                return

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return last


@pytest.mark.parametrize("asks", [[(0, 1)], [(1, 17)], [(2, 24)], [(0, 30), (2, 31)]])
def test_all_ranks_stop_at_one_step_soon_after(asks: list[tuple[int, int]]) -> None:
    last = run(asks, 3)
    assert len(set(last)) == 1
    first = min(step for _, step in asks)
    assert first <= last[0] <= first + 2 * EVERY


def test_nobody_stops_unasked() -> None:
    assert run([], 3) == [199] * 3


def test_a_process_alone_stops_at_once() -> None:
    own = Preemption()
    assert not own.agreed(1)
    own.ask()
    assert own.agreed(2)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    own = Preemption()
    with own.installed():
        own.agreed(0)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert own.agreed(1)
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


@pytest.mark.parametrize("heeds", [False, True])
def test_a_signal_that_nobody_heeds_ends_the_process(heeds: bool) -> None:
    code = (
        "import os, signal; from paceline.parallel.preemption import Preemption\n"
        f"own = Preemption()\nwith own.installed():\n    own.is_heeded = {heeds}\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\nprint('lived')"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == ((0, "lived\n") if heeds else (-signal.SIGTERM, ""))
