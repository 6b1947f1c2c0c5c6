"""Remote: packs behind https:// and s3:// addresses, with what was read of them kept on this machine."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from typing import TYPE_CHECKING

from paceline.addresses import HIDDEN, is_hidden, shown
from paceline.data import cache_folder as package_cache
from paceline.data.pack.block_cache import BlockCache, stored_bytes
from paceline.data.pack.connection import Connection, Patience, RemoteError
from paceline.data.pack.medium import MOST_HELD_BYTES
from paceline.data.pack.reader import Pack
from paceline.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("paceline")

SCHEMES = ("https", "http", "s3")
BOUND = "PACELINE_REMOTE_CACHE"
"""Environment variable: how much of remote packs is kept, such as `200GB`."""
BLOCK_BYTES = 4 << 20
PATIENCE = Patience()
_SHARE_OF_DISK = 0.5
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class RemoteFile:
    """A pack behind an address, by blocks that are kept on this machine."""

    def __init__(
        self,
        address: str,
        packs: Path,
        *,
        most_bytes: int,
        block_bytes: int,
        patience: Patience,
    ) -> None:
        self._connection = Connection(address, patience)
        self.address = self._connection.address
        self._version = self._connection.version()
        self.num_bytes = self._version.num_bytes
        self._packs = packs
        self._most_bytes = most_bytes
        self._block_bytes = block_bytes

    @property
    def version(self) -> int:
        """Always the same: blocks are kept under what their file begins with, and the first reading compares sums."""
        return 0

    def head(self, length: int) -> bytes:
        """Return the first bytes, after a look at whether the server sends parts of files at all.

        The checksums in a pack's header hang on all of its content, so blocks are kept under the address and these
        bytes: a server need not say that a file is another one, and one that was only uploaded again, or that another
        signature opens, is the same.
        """
        self._connection.require_ranges(self.num_bytes)
        content = self._connection.read(0, min(length, self.num_bytes))
        key = hashlib.blake2b(self.address.encode() + b"\0" + content, digest_size=12).hexdigest()
        self._blocks = BlockCache(
            self._packs / key,
            num_bytes=self.num_bytes,
            block_bytes=self._block_bytes,
            most_bytes=self._most_bytes,
        )
        return content

    def map(self, start: int, end: int) -> memoryview:
        """Return the tables: fetched once per machine, then mapped, or held in memory if they are small."""
        tables = self._blocks.map(start, min(end, self.num_bytes), self._connection.read)
        return tables if len(tables) > MOST_HELD_BYTES else memoryview(bytes(tables))

    def read(self, start: int, length: int) -> bytes:
        """Return a part, by whole blocks."""
        return self._blocks.read(start, length, self._fetch)

    def forget(self, start: int, length: int) -> bool:
        """Remove the blocks of a part; raises RemoteError where the file has become another since it was opened."""
        self._blocks.forget(start, length)
        self._require_same()
        return True

    def close(self) -> None:
        """Nothing is held."""

    def _fetch(self, start: int, end: int) -> bytes:
        try:
            return self._connection.read(start, end)
        except RemoteError:
            self._require_same()
            raise

    def _require_same(self) -> None:
        """Raise RemoteError where the file's size or version is another by now."""
        if self._connection.version() != self._version:
            raise RemoteError(
                f"{self.address} was replaced by another file while it was being read; start again with the new one."
            )


def open_remote(address: str, cache_folder: Path | None = None) -> Pack:
    """Open the pack at an address; raises UserError with one sentence for all that can go wrong."""
    scheme = address.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise UserError(
            f"{shown(address)}: packs are read from https:// and s3:// addresses; {scheme}:// is not offered."
        )
    if is_hidden(address):
        raise UserError(
            f"What {address} hides ({HIDDEN}) is not known on this machine; give the whole address, with data=..."
        )
    packs = (cache_folder or package_cache.cache_folder()) / "packs"
    most_bytes = bound_bytes(packs)
    medium = RemoteFile(address, packs, most_bytes=most_bytes, block_bytes=BLOCK_BYTES, patience=PATIENCE)
    pack = Pack(medium)
    address = medium.address
    log.info(
        "%s has %.2f GB; what is read of it is kept in %s, which may hold %.1f GB of remote packs.",
        address,
        medium.num_bytes / 1e9,
        packs,
        most_bytes / 1e9,
    )
    if medium.num_bytes > most_bytes:
        log.warning(
            "%s is larger than that, so parts of it are fetched again in every epoch; set %s to a larger bound.",
            address,
            BOUND,
        )
    return pack


def bound_bytes(packs: Path) -> int:
    """Return how many bytes of remote packs may be kept: as the user says, else half of what the disk has to give."""
    text = os.environ.get(BOUND, "").strip()
    if text:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?", text.upper())
        if not found or not float(found[1]):
            raise UserError(f"{BOUND} is {text!r}; write a size such as 200GB.")
        return int(float(found[1]) * _UNITS[found[2]])
    place = packs
    while not place.exists() and place != place.parent:
        place = place.parent
    return int(_SHARE_OF_DISK * (shutil.disk_usage(place).free + (stored_bytes(packs) if packs.exists() else 0)))
