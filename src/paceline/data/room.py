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
_OWN_GROUPS = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60
_MOUNTS = Path("/proc/self/mounts")
_NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "ceph", "gluster", "beegfs", "afs", "9p", "orangefs", "fuse")


def decoded_bytes(sizes: NDArray[np.integer[Any]], reductions: NDArray[np.int64]) -> int:
    """Bytes of N decoded images of `sizes` N2 px, reduced by `reductions` N, were all of them in colour."""
    return int(3 * np.prod(-(-sizes.astype(np.int64) // reductions[:, None]), axis=1).sum())


def free_memory_bytes() -> int:
    """Memory that this process may still take: of the machine, and of each control group that it is in."""
    free = int(psutil.virtual_memory().available)
    own = _own_groups()
    for root, kind, names, inactive in (
        (_CGROUP, "", ("memory.max", "memory.current"), "inactive_file"),
        (_CGROUP_1, "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
    ):
        group = root / own.get(kind, "").lstrip("/")
        for folder in (group, *group.parents):
            if folder != root and root not in folder.parents:
                break
            left = _left_bytes(folder, names, inactive)
            free = free if left is None else min(free, left)
    return max(free, 0)


def _own_groups() -> dict[str, str]:
    """Where this process is in each hierarchy of control groups: controller (empty in version 2) -> path."""
    try:
        lines = [line.split(":", 2) for line in _OWN_GROUPS.read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        return {}
    return {kind: line[2] for line in lines if len(line) == 3 for kind in line[1].split(",")}


def _left_bytes(folder: Path, names: tuple[str, str], inactive: str) -> int | None:
    """Count what the limit of a group leaves, pages of idle files included; None without a limit."""
    try:
        most, taken = (int((folder / name).read_text()) for name in names)
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control groups, or `max`: the machine's figure stands
        return None
    return most - taken + int(entries.get(inactive, 0)) if most < _UNLIMITED else None


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
