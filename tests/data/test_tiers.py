from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.data import tiers
from paceline.data.tiers import Facts, choose, read_back_bytes_per_s

if TYPE_CHECKING:
    from pathlib import Path

GB = 10**9
LARGE = Facts(
    num_images=100_000,
    decoded_bytes=90 * GB,
    encoded_bytes=15 * GB,
    free_memory_bytes=100 * GB,
    free_disk_bytes=400 * GB,
    num_threads=2,
    read_s=0.0001,
    decode_s=0.004,
    read_back_s=0.0005,
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "disk"),
        ({"decoded_bytes": 50 * GB}, "ram"),
        ({"free_disk_bytes": 112 * GB}, "none"),
        ({"read_back_s": 0.0011}, "none"),  # two threads decode in 2 ms
        ({"num_threads": 16}, "none"),
        ({"read_back_s": math.inf}, "none"),
        ({"read_back_s": math.inf, "read_s": 0.002}, "encoded"),
        ({"read_s": 0.002}, "disk"),
        ({"read_back_s": math.inf, "read_s": 0.002, "encoded_bytes": 51 * GB}, "none"),
        ({"read_s": math.inf, "decode_s": math.inf, "read_back_s": math.inf, "free_memory_bytes": 0}, "none"),
    ],
)
def test_the_rule(changes: dict[str, float], expected: str) -> None:
    assert choose(replace(LARGE, **changes)) == expected  # type: ignore[arg-type]


@given(
    decoded=st.integers(0, 10**12),
    encoded=st.integers(0, 10**12),
    memory=st.integers(0, 10**12),
    disk=st.integers(0, 10**12),
    seconds=st.tuples(*[st.floats(1e-6, 10)] * 3),
)
def test_nothing_is_chosen_that_swaps_or_fills_the_disk(
    decoded: int, encoded: int, memory: int, disk: int, seconds: tuple[float, float, float]
) -> None:
    read_s, decode_s, read_back_s = seconds
    facts = Facts(
        num_images=10,
        decoded_bytes=decoded,
        encoded_bytes=encoded,
        free_memory_bytes=memory,
        free_disk_bytes=disk,
        num_threads=3,
        read_s=read_s,
        decode_s=decode_s,
        read_back_s=read_back_s,
    )
    needed = {"ram": (decoded, 0), "disk": (0, decoded), "encoded": (encoded, 0), "none": (0, 0)}[choose(facts)]
    assert needed[0] <= memory / 2
    assert needed[1] <= 0.8 * disk


def test_reading_back_is_measured_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10**5 < read_back_bytes_per_s(tmp_path / "new") < 10**12
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    assert read_back_bytes_per_s(tmp_path / "file") == 0.0
    monkeypatch.delattr(tiers.os, "posix_fadvise")
    assert read_back_bytes_per_s(tmp_path) == 0.0
