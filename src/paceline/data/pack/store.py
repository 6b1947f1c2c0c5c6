"""Pack store: the images of an index that are entries of a pack, and which store an index has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.data.store import FileStore

if TYPE_CHECKING:
    from paceline.data.index import Index
    from paceline.data.pack.reader import PackedSplit
    from paceline.data.store import Store


class PackStore:
    """The entries of a pack by the rows of an index that was made from it."""

    def __init__(self, index: Index, packed: PackedSplit) -> None:
        self._pack = packed.pack
        self._entries = packed.entries[index.origins]  # no mapped one: a file that is cut off in use must be no signal

    def read(self, number: int) -> bytes:
        """All bytes of an entry; raises BadImage where its checksum is another."""
        return self._pack.read(int(self._entries[number]))

    def stamp(self, number: int) -> tuple[int, int]:
        """Bytes and checksum of an entry."""
        return self._pack.stamp(int(self._entries[number]))


def store_of(index: Index) -> Store:
    """Return where the images of an index come from: its pack, or the files that it names."""
    return FileStore(index) if index.packed is None else PackStore(index, index.packed)
