"""The warden: it ends what can no longer end itself, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from paceline.parallel import warden
from paceline.parallel.warden import Process

if TYPE_CHECKING:
    from collections.abc import Iterator


class Pair:
    """A process to watch, one that stands for its agent, and a warden."""

    def __init__(self, *, stopped_s: float = 1.0, agent_s: float = 1.0, sees_agent: bool = True) -> None:
        sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
        self.rank = subprocess.Popen(sleep)
        self.agent = subprocess.Popen(sleep)
        agent_pid = self.agent.pid if sees_agent else 0
        code = (
            f"import sys; sys.argv[1:] = ['{self.rank.pid}', '{agent_pid}', 'rank 3 on moon']\n"
            f"import importlib.util as u; spec = u.spec_from_file_location('warden', {warden.__file__!r})\n"
            f"m = u.module_from_spec(spec); sys.modules['warden'] = m; spec.loader.exec_module(m)\n"
            f"m.STOPPED_S, m.AGENT_S = {stopped_s}, {agent_s}; m.main()"
        )
        self.warden = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def tell(self, line: str) -> None:
        assert self.warden.stdin is not None
        self.warden.stdin.write(f"{line}\n")
        self.warden.stdin.flush()

    def said(self, *, closing: bool = False) -> str:
        """Wait for the warden's end, having closed its pipe as the end of the rank does."""
        assert self.warden.stdin is not None
        assert self.warden.stderr is not None
        if closing:
            self.warden.stdin.close()
        self.warden.wait(20)
        return self.warden.stderr.read()


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(**getattr(request, "param", {}))
    yield pair
    for process in (pair.rank, pair.agent, pair.warden):
        process.kill()
        process.wait()


def test_a_stopped_rank_is_ended_with_a_sentence(pair: Pair) -> None:
    pair.rank.send_signal(signal.SIGSTOP)
    assert "rank 3 on moon was stopped" in pair.said()
    assert pair.rank.wait(5) == -signal.SIGKILL
    assert pair.agent.poll() is None


@pytest.mark.parametrize("pair", [{"sees_agent": False}], indirect=True)
def test_the_first_process_of_a_container_is_guarded_too(pair: Pair) -> None:
    """Who started it is outside, where its number is 0."""
    pair.tell("lost")
    pair.rank.send_signal(signal.SIGSTOP)
    assert "rank 3 on moon was stopped" in pair.said()
    assert pair.rank.wait(5) == -signal.SIGKILL


def test_a_suspended_job_is_left_alone(pair: Pair) -> None:
    pair.agent.send_signal(signal.SIGSTOP)
    pair.rank.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        pair.warden.wait(3)
    assert pair.rank.poll() is None


def test_a_rank_that_says_nothing_after_its_time_is_ended(pair: Pair) -> None:
    pair.tell("600")
    pair.tell("1")
    start = time.monotonic()
    assert "was stuck" in pair.said()
    assert pair.rank.wait(5) == -signal.SIGKILL
    assert time.monotonic() - start > 0.9


def test_the_end_of_a_rank_ends_the_warden_and_nothing_else(pair: Pair) -> None:
    pair.tell("1")
    assert pair.said(closing=True) == ""
    assert pair.agent.poll() is None
    assert pair.rank.poll() is None


def test_an_agent_that_waits_for_a_lost_store_is_ended(pair: Pair) -> None:
    pair.tell("lost")
    assert pair.said(closing=True) == ""
    assert pair.agent.wait(5) == -signal.SIGKILL


def test_a_process_is_not_taken_for_a_later_one() -> None:
    own = Process.of(os.getpid())
    assert own.state() in "RS"
    other = Process(pid=own.pid, started=own.started + 1)
    assert other.state() == "X"
    other.kill()  # nothing happens
    with pytest.raises(ProcessLookupError):
        Process.of(2**22 - 1)
