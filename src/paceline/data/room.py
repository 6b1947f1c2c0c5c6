"""Room: what images need, and what memory and disks have left for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_1 = Path("/sys/fs/cgroup/memory")
_UNLIMITED = 1 << 60


def decoded_bytes(sizes: NDArray[np.integer[Any]], reductions: NDArray[np.int64]) -> int:
    """Bytes of N decoded images of `sizes` N2 px, reduced by `reductions` N, were all of them in colour."""
    return int(3 * np.prod(-(-sizes.astype(np.int64) // reductions[:, None]), axis=1).sum())


def free_memory_bytes() -> int:
    """Memory that this process may still take: of the machine, and of its container."""
    free = int(psutil.virtual_memory().available)
    for limit, used, stat, inactive in (
        (_CGROUP / "memory.max", _CGROUP / "memory.current", _CGROUP / "memory.stat", "inactive_file"),
        (
            _CGROUP_1 / "memory.limit_in_bytes",
            _CGROUP_1 / "memory.usage_in_bytes",
            _CGROUP_1 / "memory.stat",
            "total_inactive_file",
        ),
    ):
        try:  # without control groups, or without a limit, the machine's figure stands
            most, taken = int(limit.read_text()), int(used.read_text())
            entries = dict(line.split() for line in stat.read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most < _UNLIMITED:
            free = min(free, most - taken + int(entries.get(inactive, 0)))
    return max(free, 0)


def free_disk_bytes(folder: Path) -> int:
    """Bytes that this user may still write where `folder` is, or would be made; 0 where nobody knows."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free if os.access(place, os.W_OK) else 0
    except OSError:
        return 0
