"""Work in the background: results and errors reach whoever asks, and snapshots do not follow their source."""

from __future__ import annotations

import threading

import pytest
import torch

from paceline.training.background import Errand
from paceline.training.snapshot import HostSnapshot


def test_an_errand_runs_on_a_thread_of_its_own_that_ends() -> None:
    errand = Errand("test", lambda: threading.current_thread().name)
    assert errand.result() == "paceline-test"
    assert errand.result() == "paceline-test", "may be asked again"
    assert errand.is_done
    assert "paceline-test" not in [thread.name for thread in threading.enumerate()]


def test_an_errand_is_not_done_before_its_work() -> None:
    gate = threading.Event()
    errand = Errand("test", gate.wait)
    assert not errand.is_done
    assert not errand.join(0.01)
    gate.set()
    assert errand.join()


def test_an_error_is_raised_where_the_result_is_asked_for() -> None:
    def fail() -> None:
        raise ValueError("from the thread")

    errand = Errand("test", fail)
    assert errand.join()
    for _ in range(2):
        with pytest.raises(ValueError, match="from the thread"):
            errand.result()


def test_a_snapshot_is_what_the_tensors_were() -> None:
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    count = torch.tensor(7)
    before = weight.clone()
    snapshot = HostSnapshot()
    copies = snapshot.take({"weight": weight, "count": count})
    weight.zero_()
    count += 1
    snapshot.wait()
    assert torch.equal(copies["weight"], before)
    assert copies["weight"].is_contiguous()
    assert copies["count"] == 7


def test_memory_is_used_again_where_it_fits() -> None:
    snapshot = HostSnapshot()
    first = snapshot.take({"a": torch.ones(8), "b": torch.ones(4), "gone": torch.ones(2)})
    places = {key: value.data_ptr() for key, value in first.items()}
    second = snapshot.take({"a": torch.zeros(8), "b": torch.zeros(5), "new": torch.zeros(3)})
    assert second.keys() == {"a", "b", "new"}
    assert second["a"].data_ptr() == places["a"]
    assert second["b"].shape == (5,)
    assert not second["a"].any()


def test_tensors_that_share_memory_are_copied_apart() -> None:
    shared = torch.ones(4)
    copies = HostSnapshot().take({"a": shared, "b": shared})
    assert copies["a"].data_ptr() != copies["b"].data_ptr()
