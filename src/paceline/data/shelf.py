"""Shelf: how one loader keeps its images, opened once and closed at its end; the ranks of a machine share one."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import platform
import time
import weakref
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paceline.data import locks, room
from paceline.data.agreement import Agreement, shared_folder
from paceline.data.cache import RecentCache, SlabCache
from paceline.data.cache_folder import cache_folder
from paceline.data.slab import Slab
from paceline.data.slab_file import remove_unused
from paceline.data.tiers import SHARE_OF_DISK, Facts, choose, read_back_bytes_per_s

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from paceline.data.cache import Cache
    from paceline.data.index import Index
    from paceline.data.store import Store
    from paceline.data.tiers import Choice, Purpose, Tier

log = logging.getLogger("paceline")

_SHARES: Mapping[Purpose, float] = {"training": 0.5, "evaluation": 0.25}
"""Of the free memory, what `auto` takes at most; both loaders of a run look at it before either has filled its part."""
_SHARES_WHEN_ASKED: Mapping[Purpose, float] = {"training": 0.65, "evaluation": 0.25}
_SPARED_DISK_BYTES = 1 << 30
_PROBED_IMAGES, _PROBE_S = 16, 1.0
_MARGIN = 1.05
_UNUSED_DAYS = 30
"""A disk cache that no run has opened for so long is removed by the next run that could keep one itself."""
_BYTES_BESIDE = 64
"""Of an image in a slab, at most: what its alignment takes."""


class Shelf:
    """How one loader keeps its images: opened once, closed at its end.

    `decode` makes an image from its bytes; `num_recent` are kept anyway because they are needed again soon, unless
    memory is short; `world` ranks may share a machine; `what` the images are for decides their share of the memory.
    """

    def __init__(
        self,
        index: Index,
        store: Store,
        reductions: NDArray[np.int64],
        decode: Callable[[int, bytes], NDArray[np.uint8]],
        *,
        num_recent: int,
        num_threads: int,
        world: int,
        what: Purpose,
    ) -> None:
        self._index = index
        self._store = store
        self._reductions = reductions
        self._decode = decode
        self._num_threads = num_threads
        self._world = world
        self._shares_memory = world > 1 and locks.AVAILABLE
        self._what = what
        self._bound_bytes = room.decoded_bytes(index.sizes, reductions)
        holds = _SHARES[what] * room.free_memory_bytes() / world / (self._bound_bytes / len(index))
        self._num_recent = min(num_recent, int(holds))
        self._name = _name(index, reductions)
        self._probed: Probe | None = None
        self._tried: dict[int, NDArray[np.uint8]] = {}
        self._capacity = 0
        self.tier: Tier = "none"
        self.cache: Cache = RecentCache(self._num_recent)
        self.store = store
        """The store to read from: `encoded` puts memory before the one that was given."""
        self._shared = ExitStack()
        self.close = weakref.finalize(self, self._shared.close)
        """Leave what is shared with other processes; done at the latest when the interpreter ends."""

    def open(self, choice: Choice) -> None:
        """Choose, say so, and open; what cannot be opened is said in a sentence, and the next tier takes its place."""
        if self._shares_memory and choice != "none":
            agreement = Agreement(shared_folder(), f"{self._name}-{choice}")
            self._shared.callback(agreement.leave)
            try:
                word, is_first = agreement.settle(lambda: self._open_first(choice))
            except OSError as error:
                log.warning("The ranks of this machine cannot share a cache (%s): each keeps its own.", error)
            else:
                if not is_first:
                    self._join(word)
                return
        self._shares_memory = False
        self._open_first(choice)

    def _open_first(self, choice: Choice) -> str:
        """Choose and open as the first of this machine; returns the word for the others."""
        if choice in ("auto", "disk"):
            remove_old(_images_folder())
        facts = self._facts(choice)
        tier = choose(facts) if choice == "auto" else "ram" if choice == "device" else choice
        where = ""
        while tier != "none":
            try:
                where = self._open(tier, choice, facts)
                break
            except (OSError, MemoryError) as error:
                following: Tier = "ram" if tier == "disk" and facts.fits_memory else "none"
                log.warning(
                    "cache=%s for %s is not possible (%s); cache=%s takes its place.",
                    tier,
                    self._what,
                    _reason(error),
                    following,
                )
                tier = following
        self.tier = tier
        for number, pixels in self._tried.items():
            self.cache.get(number, lambda pixels=pixels: pixels)  # type: ignore[misc]
        self._tried.clear()
        self._say(choice, facts, where)
        return f"{tier} {self._capacity} {where}"

    def _join(self, word: str) -> None:
        """Open what the first of this machine has chosen."""
        tier, capacity, where = word.split(" ", 2)
        assert tier in ("ram", "disk", "encoded", "none")
        self.tier = tier  # type: ignore[assignment]
        if tier == "none":
            return
        try:
            self._use(self.tier, Slab.open(Path(where), len(self._index), int(capacity), kept=tier == "disk"))
        except OSError as error:
            log.warning("The cache of the other ranks cannot be used (%s); this one has none.", error.strerror or error)
            self.tier = "none"

    def _open(self, tier: Tier, choice: Choice, facts: Facts) -> str:
        """Open a tier and return its file, if it has one. Raises OSError where it cannot be."""
        count = len(self._index)
        if tier == "disk":
            if not locks.AVAILABLE or not hasattr(os, "posix_fallocate"):
                raise OSError("this system has no locks on parts of files")
            path = _images_folder() / f"{self._name}.slab"
            taken = path.stat().st_blocks * 512 if path.exists() else 0
            ample = int(_MARGIN * self._bound())  # for arrays whose place is lost
            capacity = min(ample, taken + facts.free_disk_bytes - _SPARED_DISK_BYTES)
            if capacity <= 0:
                raise OSError(f"{path.parent} has no room left")
            self._capacity = capacity
            self._use(tier, Slab.open(path, count, capacity, kept=True))
            os.utime(path)  # reading alone would leave it as old as its last image
            return str(path)
        share = self._share(_SHARES_WHEN_ASKED if choice in ("ram", "device") else _SHARES)
        needed = facts.decoded_bytes if tier == "ram" else facts.encoded_bytes
        bound = self._bound() if tier == "ram" else int(_MARGIN * needed) + _BYTES_BESIDE * count
        capacity = min(bound, int(share * facts.free_memory_bytes))
        self._capacity = capacity
        if self._shares_memory:
            return self._open_shared(tier, capacity, min(needed, capacity))
        self._use(tier, Slab(count, capacity))
        return ""

    def _open_shared(self, tier: Tier, capacity: int, needed: int) -> str:
        """Open a file that goes with its last user: in memory where that has room for it, else in the cache folder."""
        reason: OSError | None = None
        for folder in (shared_folder(), _images_folder()):
            for stale in folder.glob("*.run.slab"):
                if remove_unused(stale):
                    log.info("Removed %s, which a process that died has left.", stale)
            path = folder / f"{self._name}-{tier}.run.slab"
            try:
                slab = Slab.open(path, len(self._index), capacity, kept=False)
            except OSError as error:
                reason = error
                continue
            if slab.reserve(needed):
                self._use(tier, slab)
                return str(path)
            reason = OSError(slab.full)
            slab.close()
        assert reason is not None
        raise reason

    def _use(self, tier: Tier, slab: Slab) -> None:
        self._shared.callback(slab.close)
        if tier == "encoded":
            self.store = EncodedStore(self._store, slab, what=self._what)
            return
        stamp = self._stamp if tier == "disk" else lambda _: 0
        self.cache = SlabCache(slab, RecentCache(self._num_recent), what=f"images for {self._what}", stamp=stamp)

    def _stamp(self, number: int) -> int:
        """One number of what the disk cache was made from; what else matters is part of the file's name."""
        size, time_ns = self._store.stamp(number)
        return int.from_bytes(hashlib.blake2b(f"{size} {time_ns}".encode(), digest_size=8).digest(), "little")

    def _share(self, shares: Mapping[Purpose, float]) -> float:
        """Share of the free memory for one copy of the images: ranks that cannot share it have one each."""
        return shares[self._what] / (1 if self._shares_memory else self._world)

    def _bound(self) -> int:
        return self._bound_bytes + _BYTES_BESIDE * len(self._index)

    def _facts(self, choice: Choice) -> Facts:
        """Measure as much as the choice needs; images are only tried out where their sizes do not decide alone."""
        free = room.free_memory_bytes()
        disk = _images_folder()
        facts = Facts(
            num_images=len(self._index),
            decoded_bytes=self._bound_bytes,
            encoded_bytes=0,
            free_memory_bytes=free,
            share_of_memory=self._share(_SHARES),
            free_disk_bytes=room.free_disk_bytes(disk),
            num_threads=self._num_threads,
        )
        if choice in ("none", "disk") or (facts.fits_memory and not self._shares_memory):
            return facts
        self._probed = probe = self._probe()
        if probe is None:  # not one image could be read; the first pictures will say so
            return facts
        decoded = int(min(_MARGIN * probe.decoded_share, 1.0) * self._bound_bytes)
        read_back_s = math.inf
        if choice == "auto" and decoded > self._share(_SHARES) * free and locks.AVAILABLE:
            rate = read_back_bytes_per_s(disk) if decoded <= SHARE_OF_DISK * facts.free_disk_bytes else 0.0
            read_back_s = decoded / len(self._index) / rate if rate > 0 else math.inf
        return Facts(
            num_images=facts.num_images,
            decoded_bytes=decoded,
            encoded_bytes=int(probe.encoded_bytes * len(self._index)),
            free_memory_bytes=free,
            share_of_memory=self._share(_SHARES),
            free_disk_bytes=facts.free_disk_bytes,
            num_threads=self._num_threads,
            read_s=probe.read_s,
            decode_s=probe.decode_s,
            read_back_s=read_back_s,
        )

    def _probe(self) -> Probe | None:
        """Read and decode a few images, for a second at most; None where not one of them can be."""
        read_s = decode_s = 0.0
        encoded, decoded, bound, num_tried = 0, 0, 0, 0
        for number in np.unique(np.linspace(0, len(self._index) - 1, _PROBED_IMAGES).astype(int)).tolist():
            start = time.perf_counter()
            try:
                content = self._store.read(number)
                middle = time.perf_counter()
                pixels = self._decode(number, content)
            except Exception:  # whatever a store or a decoder throws; the image is named when its turn comes
                continue
            end = time.perf_counter()
            read_s, decode_s, num_tried = read_s + middle - start, decode_s + end - middle, num_tried + 1
            self._tried[number] = pixels
            encoded, decoded = encoded + len(content), decoded + pixels.size
            bound += room.decoded_bytes(self._index.sizes[[number]], self._reductions[[number]])
            if read_s + decode_s > _PROBE_S:
                break
        if num_tried == 0:
            return None
        return Probe(
            read_s=read_s / num_tried,
            decode_s=decode_s / num_tried,
            encoded_bytes=encoded / num_tried,
            decoded_share=decoded / bound,
        )

    def _say(self, choice: Choice, facts: Facts, where: str) -> None:
        chosen = {
            "ram": "each is decoded once and kept in memory",
            "disk": f"each is decoded once and kept in {where}",
            "encoded": "files are kept in memory and decoded each time",
            "none": f"at most {self._num_recent:,} are kept at a time" if self._num_recent else "none is kept",
        }[self.tier]
        measured = ""
        if self._probed is not None:
            measured = f" reading one takes {1e3 * facts.read_s:.1f} ms, decoding {1e3 * facts.decode_s:.1f} ms"
            if math.isfinite(facts.read_back_s):
                measured += f", reading it back from disk {1e3 * facts.read_back_s:.1f} ms"
            measured += f" ({facts.num_threads} threads);"
        log.info(
            "cache=%s: %s images for %s need %s decoded; %s of memory and %s of disk are free;%s %s%s.",
            choice,
            f"{facts.num_images:,}",
            self._what,
            *(_size(size) for size in (facts.decoded_bytes, facts.free_memory_bytes, facts.free_disk_bytes)),
            measured,
            chosen,
            ", one copy for all ranks" if self._world > 1 and where else "",
        )


def remove_old(folder: Path) -> None:
    """Remove the disk caches that nobody has opened for long, and nobody uses."""
    for path in folder.glob("*.slab"):
        with suppress(OSError):  # another run was faster
            status = path.stat()
            days = (time.time() - status.st_mtime) / 86_400
            if days > _UNUSED_DAYS and remove_unused(path):
                log.info(
                    "Removed %s (%s), a disk cache that was last opened %.0f days ago.",
                    path,
                    _size(512 * status.st_blocks),
                    days,
                )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a few images, evenly spread over the set, tell of all."""

    read_s: float
    decode_s: float
    encoded_bytes: float
    """Of one image."""
    decoded_share: float
    """Bytes that they took, as a share of three planes each."""


class EncodedStore:
    """A store whose images are read once, by whichever process comes first, and kept in memory as they are."""

    def __init__(self, store: Store, slab: Slab, *, what: str) -> None:
        self._store = store
        self._cache = SlabCache(slab, RecentCache(0), what=f"files for {what}")

    def read(self, number: int) -> bytes:
        """All bytes of an image; raises BadImage."""
        return self._cache.get(number, lambda: np.frombuffer(self._store.read(number), np.uint8)[None]).tobytes()

    def stamp(self, number: int) -> tuple[int, int]:
        """As the store below says."""
        return self._store.stamp(number)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _reason(error: OSError | MemoryError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or "no memory"


def _images_folder() -> Path:
    """Return the folder for slabs that lie on disk: one for each machine where several may see it."""
    folder = cache_folder() / "images"
    return folder / platform.node() if room.is_on_network(folder) else folder


def _name(index: Index, reductions: NDArray[np.int64]) -> str:
    """Name these images, decoded in this way."""
    state = hashlib.blake2b(os.fsencode(index.root) + b"\0", digest_size=12)
    for array in (index.paths.blob, index.paths.offsets, index.orientation, index.sizes, reductions):
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()
