"""The heartbeat: it costs nothing, and says where a thread is."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import cloudpickle
import pytest
import torch
import torch.distributed as dist

from paceline.errors import UserError
from paceline.parallel import process_group
from paceline.parallel.config import LimitsConfig
from paceline.parallel.fault import Fault
from paceline.parallel.heartbeat import FAULT_FILE, Heartbeat, _say, _where
from paceline.parallel.launch import launch
from paceline.parallel.preemption import Preemption
from paceline.parallel.process_group import joined
from paceline.parallel.rank import Rank
from paceline.parallel.warden import Process, space_of_processes

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True, scope="module")
def _by_value() -> Iterator[None]:
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def heartbeat() -> Heartbeat:
    rank = Rank(world=2, node="here", run="test")
    return Heartbeat(dist.HashStore(), rank, LimitsConfig(), address="nowhere:0", preemption=Preemption())


def test_a_report_costs_less_than_two_microseconds() -> None:
    beat = heartbeat()
    best_s = min(timed(beat) for _ in range(5))
    assert best_s < 2e-6


def timed(beat: Heartbeat) -> float:
    start = time.thread_time()
    for step in range(10_000):
        beat.report(step, "step")
    return (time.thread_time() - start) / 10_000


def test_it_sees_how_long_nothing_has_changed() -> None:
    beat = heartbeat()
    beat.report(3, "step")
    first = beat._next_beat(1)
    time.sleep(0.05)
    second = beat._next_beat(2)
    assert (first.step, first.phase) == (3, "step")
    assert second.phase_s - first.phase_s >= 0.05
    beat.report(4, "step")
    assert beat._next_beat(3).phase_s < 0.05
    beat.follow(lambda: (9, "evaluation"))
    assert (beat._next_beat(4).step, beat._next_beat(4).phase) == (9, "evaluation")


def test_it_names_the_line_outside_torch_and_knows_who_waits() -> None:
    ready, go_on, names = threading.Event(), threading.Event(), {}  # type: ignore[var-annotated]
    source = "def collective(ready, go_on):\n    ready.set()\n    go_on.wait()\n"
    exec(compile(source, str(Path(torch.__file__).parent / "distributed" / "some.py"), "exec"), names)

    def wait_for_others() -> None:
        names["collective"](ready, go_on)

    thread = threading.Thread(target=wait_for_others, daemon=True)
    thread.start()
    ready.wait()
    where, waits = _where(sys._current_frames()[thread.ident or 0])
    assert where.startswith("test_heartbeat.py:")
    assert where.endswith(" in wait_for_others")
    assert waits
    here, waits_here = _where(sys._getframe())
    assert not waits_here
    assert "test_it_names_the_line" in here
    go_on.set()
    thread.join()


def test_a_warden_that_is_gone_does_not_spoil_the_end() -> None:
    beat = heartbeat()
    beat.start()
    assert beat._warden is not None
    beat._warden.kill()
    beat._warden.wait()
    beat._tell_warden("45")  # which stays in the pipe
    beat.stop()


def test_a_fault_that_cannot_be_handed_to_the_launcher_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As where the folder of temporary files is full."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(FAULT_FILE, str(tmp_path / "file" / "fault.json"))
    _say(Fault(rank=1, host="moon", step=3, phase="step", what="was killed"))
    said = "paceline: rank 1 on moon was killed (step 3, phase step); all ranks were ended.\n"
    assert capsys.readouterr().err == said


def test_a_rank_of_another_container_on_the_host_is_not_taken_for_dead() -> None:
    """Its number means another process here, or none; that it lives is heard from it."""
    beat, own = heartbeat(), Process.of(os.getpid())
    common = {"host": "here", "node": beat._rank.node, "pid": own.pid, "started": own.started}
    people: dict[int, dict[str, str | int]] = {
        rank: common | {"space": space} for rank, space in enumerate((space_of_processes(), "pid:[7]"))
    }
    beat._meet(people)
    assert beat._peers == {0: own}


def test_a_rank_that_died_before_all_had_met_is_known_to_be_dead() -> None:
    beat, own = heartbeat(), Process.of(os.getpid())
    common = {"host": "here", "node": beat._rank.node, "space": space_of_processes(), "pid": own.pid}
    beat._meet({0: common | {"started": own.started}, 1: common | {"started": own.started - 1}})
    assert beat._peers[1].state() == "X"


def connect(failures: int) -> float:
    """Join a group whose connections fail at first, on rank 1."""
    real, left = dist.init_process_group, [failures]

    def flaky(*args: object, **kwargs: object) -> None:
        import os

        if os.environ["RANK"] == "1" and left[0] > 0:
            left[0] -= 1
            raise RuntimeError("Gloo connectFullMesh failed with Connect timeout")
        real(*args, **kwargs)  # type: ignore[arg-type]

    process_group.CONNECT_S = 3.0
    dist.init_process_group = flaky  # type: ignore[assignment]
    with joined(backend="gloo", limits=LimitsConfig()) as group:
        total = torch.ones(1) * (group.rank.rank + 1)
        dist.all_reduce(total)
        return float(total)


def test_connections_that_fail_are_made_again() -> None:
    assert launch(2, connect, 1) == 3.0


@pytest.mark.slow
def test_connections_that_always_fail_are_one_sentence() -> None:
    with pytest.raises(UserError, match="could not be connected in 4 tries"):
        launch(2, connect, 99)
