"""The peak of a piece of work, against memory of known size."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from paceline import resident
from paceline.training import peak as module
from paceline.training.peak import HostPeak

MB = 1_000_000

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")


@pytest.fixture(params=["kept by Linux", "sampled"])
def peak(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HostPeak:
    if request.param == "sampled":
        monkeypatch.setattr(resident, "_CLEAR", resident._STATUS.parent / "no_such_file")
    found = HostPeak()
    if request.param != "sampled" and not found._exact:
        pytest.skip("this Linux does not let a process start its peak anew")
    return found


def touch(megabytes: int) -> None:
    for _ in range(5):  # long enough for one who looks now and then
        np.ones(megabytes * MB, np.uint8).sum(dtype=np.int64)


@pytest.mark.parametrize("megabytes", [50, 200])
def test_what_was_freed_again_counts(peak: HostPeak, megabytes: int) -> None:
    before = peak.held_bytes()
    most = peak.of(lambda: touch(megabytes))
    assert megabytes * MB * 0.9 < most - before < megabytes * MB * 1.2 + 10 * MB
    assert abs(peak.held_bytes() - before) < 10 * MB


def test_earlier_peaks_do_not_count(peak: HostPeak) -> None:
    large = peak.of(lambda: touch(300))
    small = peak.of(lambda: touch(20))
    assert large - small > 200 * MB


def test_what_fails_passes_through(peak: HostPeak) -> None:
    def fail() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        peak.of(fail)
    assert peak.of(lambda: touch(20)) > 0


def test_free_memory_is_what_the_container_has_left(peak: HostPeak, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 7)
    assert peak.free_bytes() == 7
