from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from paceline.data.agreement import Agreement

if TYPE_CHECKING:
    from pathlib import Path


def test_the_first_gives_the_word_and_all_others_take_it(tmp_path: Path) -> None:
    given, barrier = [], threading.Barrier(8)

    def enter(number: int) -> tuple[str, bool]:
        def decide() -> str:
            given.append(number)
            return f"word of {number}"

        barrier.wait()
        return members[number].settle(decide)

    members = [Agreement(tmp_path, "name") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(enter, range(8)))
    assert len(given) == 1
    assert {word for word, _ in found} == {f"word of {given[0]}"}
    assert [is_first for _, is_first in found].count(True) == 1
    members[given[0]].leave()
    late = Agreement(tmp_path, "name")
    assert late.settle(lambda: "another") == (f"word of {given[0]}", False)
    for member in [*members, late]:
        member.leave()
    assert list(tmp_path.iterdir()) == []
    assert late.settle(lambda: "another") == ("another", True)
    late.leave()


def test_names_are_apart(tmp_path: Path) -> None:
    one, two = Agreement(tmp_path, "one"), Agreement(tmp_path, "two")
    assert one.settle(lambda: "1") == ("1", True)
    assert two.settle(lambda: "2") == ("2", True)
    one.leave()
    two.leave()


def test_an_error_of_the_first_leaves_the_word_to_the_next(tmp_path: Path) -> None:
    def fail() -> str:
        raise ValueError("no idea")

    one, two = Agreement(tmp_path, "name"), Agreement(tmp_path, "name")
    with pytest.raises(ValueError, match="no idea"):
        one.settle(fail)
    assert two.settle(lambda: "mine") == ("mine", True)
    two.leave()


SETTLE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from paceline.data.agreement import Agreement

Agreement(Path(sys.argv[1]), "name").settle(lambda: "of the dead")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_word_of_a_dead_process_counts_no_more(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", SETTLE_AND_DIE, str(tmp_path)], check=False, timeout=60)
    assert dead.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    member = Agreement(tmp_path, "name")
    assert member.settle(lambda: "of the living") == ("of the living", True)
    member.leave()
