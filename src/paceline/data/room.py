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
_MOUNTS = Path("/proc/self/mounts")
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "ceph", "gluster", "beegfs", "afs", "9p", "orangefs", "fuse")


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


def is_on_network(folder: Path) -> bool:
    """Whether the file system of a folder may be that of several machines, which do not see each other's pages."""
    try:
        lines = [line.split() for line in _MOUNTS.read_text(errors="surrogateescape").splitlines()]
    except OSError:
        return False  # no Linux: nothing is shared there anyhow
    place = folder.resolve()
    kinds = {Path(line[1].replace("\\040", " ")): line[2] for line in lines if len(line) > 2}
    for parent in (place, *place.parents):
        if parent in kinds:
            return kinds[parent].startswith(_NETWORK)
    return False
