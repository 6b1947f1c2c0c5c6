"""Pack source: a pack as a data set to train and evaluate on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.data.chunks import map_chunks
from paceline.data.findings import FindingCollector, ScanReport
from paceline.data.headers import BadImage
from paceline.data.pack.store import store_of
from paceline.data.scan import Listing, Scan
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.data.pack.reader import Pack


@dataclass(frozen=True, kw_only=True)
class PackSource:
    """A pack; its images and labels were checked when it was made."""

    pack: Pack

    format = "pack"

    @property
    def is_local(self) -> bool:
        """Whether the pack is a file of this machine."""
        return "://" not in self.pack.address

    @property
    def path(self) -> Path | str:
        """File or address of the pack."""
        return Path(self.pack.address) if self.is_local else self.pack.address

    @property
    def root(self) -> Path:
        """Where names in it start from, for messages."""
        return self.pack.place

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that were packed."""
        return self.pack.splits

    def identity(self) -> tuple[str, ...]:
        """Return its address; its index is never stored besides."""
        return (self.pack.address,)

    def list_files(self, split: str) -> Listing:
        """Return nothing: a pack has no files."""
        return Listing(stamps={})

    def scan(self, split: str, listing: Listing) -> Scan:
        """Open the index of a split; no image is looked at."""
        index = self.pack.index(split)
        return Scan(index=index, report=ScanReport(num_images=len(index), num_boxes=len(index.labels)))

    def missing(self, split: str) -> str:
        """Nothing: a pack is one file."""
        return ""

    def where_labels_are(self, split: str) -> str:
        """Say that they are inside."""
        return f"the pack itself, which was made from a {self.pack.made_from} data set"

    def require_imgsz(self, imgsz: int) -> None:
        """Raise UserError where the images were reduced for a smaller input."""
        if 0 < self.pack.imgsz < imgsz:
            raise UserError(
                f"{self.path} holds images that were reduced for imgsz={self.pack.imgsz}, so imgsz={imgsz} has too few "
                f"pixels; choose imgsz={self.pack.imgsz} or less, or pack the data set again with --imgsz {imgsz}."
            )

    def verify(self, split: str) -> ScanReport:
        """Read every image of a split, in threads, and compare its checksum; damaged ones are findings."""
        index = self.pack.index(split)
        store = store_of(index)

        def work(rows: Sequence[int]) -> ScanReport:
            collector = FindingCollector()
            for row in rows:
                try:
                    store.read(row)
                except BadImage as error:
                    collector.add("image", index.paths[row], 0, str(error))
            return ScanReport(counts=dict(collector.counts), findings=tuple(collector.findings))

        return ScanReport.join(map_chunks(work, range(len(index))))
