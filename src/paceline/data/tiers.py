"""Tiers: the places where decoded images may be kept between two uses, and the rule that chooses among them.

    tier      kept                                 by                                   an image costs, once it is there
    ram       all, decoded, in memory              all ranks of a machine together      nothing
    disk      all, decoded, in a file that stays   all runs on a machine                reading back
    encoded   all, as files, in memory             all ranks of a machine together      decoding
    none      the few that are needed again soon   each rank for itself                 reading and decoding

`auto` is the rule of `choose` on measured numbers, which the log says.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

Choice = Literal["auto", "none", "ram", "disk", "device"]
Tier = Literal["ram", "disk", "encoded", "none"]
Purpose = Literal["training", "evaluation"]

SHARE_OF_DISK = 0.8
"""Of the free disk, what `auto` takes at most."""
_SLOW_READ_SHARE = 0.25
_GAIN = 2.0
_READ_BACK_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the choice hangs on. Seconds are those of one thread for one image; infinite where not measured."""

    num_images: int
    decoded_bytes: int
    encoded_bytes: int
    free_memory_bytes: int
    share_of_memory: float = 0.5
    """What of it these images may take."""
    free_disk_bytes: int
    num_threads: int
    read_s: float = math.inf
    decode_s: float = math.inf
    read_back_s: float = math.inf
    """From the disk of the cache folder, past the system's own cache."""

    @property
    def fits_memory(self) -> bool:
        """Whether all may be kept decoded in memory."""
        return self.decoded_bytes <= self.share_of_memory * self.free_memory_bytes


def choose(facts: Facts) -> Tier:
    """Return the tier that costs least of those that fit, as far as the numbers say.

    Memory: only a share of what is free may be taken, so that nothing swaps. Disk: reading back has to be twice as
    fast as all threads together read and decode, and may take four fifths of what is free. Encoded images in memory
    help where reading a file takes a quarter of the time of decoding it; else the system's own cache does as well.
    """
    memory = facts.share_of_memory * facts.free_memory_bytes
    if facts.fits_memory:
        return "ram"
    made_s = (facts.read_s + facts.decode_s) / facts.num_threads
    fits_disk = facts.decoded_bytes <= SHARE_OF_DISK * facts.free_disk_bytes
    if fits_disk and math.isfinite(facts.read_back_s) and _GAIN * facts.read_back_s <= made_s:
        return "disk"
    if facts.encoded_bytes <= memory and facts.read_s >= _SLOW_READ_SHARE * facts.decode_s:
        return "encoded"
    return "none"


def read_back_bytes_per_s(folder: Path) -> float:
    """Measure how fast the disk of a folder gives back what was written, past the system's cache; 0 where it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return 0.0
    path = folder / f"rate-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("w+b", buffering=0) as file:
            block = os.urandom(1 << 20)
            for _ in range(_READ_BACK_BYTES // len(block)):
                file.write(block)
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            file.seek(0)
            while file.read(len(block)):
                pass
            return _READ_BACK_BYTES / (time.perf_counter() - start)
    except OSError:
        return 0.0
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
