"""Memory that was freed stays with the process where that was asked for, and is given back all the same."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from paceline.resident import give_back, keep_freed, resident_bytes

if sys.argv[1] == "kept":
    keep_freed()
torch.set_num_threads(1)

def use():
    values = torch.empty(10_000_000).fill_(1.0)
    beside = [torch.empty(10_000_000) for _ in range(int(sys.argv[2]))]

for _ in range(30):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5
held = resident_bytes()
give_back()
print(faults, held - resident_bytes())
"""


def measured(way: str, beside: int = 0, **environment: str) -> tuple[int, int]:
    """Pages that each use of 40 MB has cleared, and bytes that are given back in the end, of a process of its own.

    beside: so many further pieces of 40 MB are there at the same time, and are not touched.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, way, str(beside)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=kept | environment)
    faults, given_back = done.stdout.split()
    return int(faults), int(given_back)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no such call")
def test_pages_are_cleared_once_where_memory_is_kept() -> None:
    usual, _ = measured("usual")
    kept, given_back = measured("kept")
    assert usual > 1000
    assert kept < usual / 100
    assert given_back > 30_000_000
    tuned, _ = measured("kept", MALLOC_ARENA_MAX="2")
    assert tuned > 1000, "the user's own tuning stands"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no such call")
def test_more_than_two_gigabytes_are_kept_too() -> None:
    """As many as a step of a large network frees."""
    kept, _ = measured("kept", beside=75)
    assert kept < 10
