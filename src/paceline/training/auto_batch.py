"""`batch=auto`: how many images a device takes at once, from tries of a few sizes and the line through their memory.

```
bytes |                      . x   verified by a try of its own
      |                 . '
room  |- - - - - - . ' - - - - -
      |       x '
      |  x '                       2, 4, then the usual size and its doubles, while the line says that they fit
      +-------------------------   and every double brings more images a second
            images
```
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SAME_SPEED = 1.03
"""Rates within this factor of the best count as the best: the smallest of their batches is taken."""
FIRST = 2
_FALLS = 4
"""Tries that may fail after one has fitted."""
_STEP_DOWN = 0.85


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a try of so many images on one device found."""

    images: int
    peak_bytes: int
    """The most that the process held."""
    seconds: float
    """Of one step."""

    @property
    def images_per_s(self) -> float:
        """Images of one device per second."""
        return self.images / max(self.seconds, 1e-9)


class Meter(Protocol):
    """Tries a number of images."""

    def __call__(self, images: int) -> Trial | None:
        """Take whole steps of so many images; None where memory ran out."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Memory by images: no try lies above it."""

    fixed_bytes: float
    image_bytes: float

    @classmethod
    def through(cls, trials: Sequence[Trial]) -> Line:
        """Fit to two tries or more of different sizes: least squares, raised to the highest of them.

        A line that falls, which is noise, becomes level.
        """
        assert len({trial.images for trial in trials}) > 1
        mean_images = sum(trial.images for trial in trials) / len(trials)
        mean_bytes = sum(trial.peak_bytes for trial in trials) / len(trials)
        spread = sum((trial.images - mean_images) ** 2 for trial in trials)
        rise = sum((trial.images - mean_images) * (trial.peak_bytes - mean_bytes) for trial in trials)
        image_bytes = max(rise / spread, 0.0)
        return cls(
            fixed_bytes=max(trial.peak_bytes - image_bytes * trial.images for trial in trials), image_bytes=image_bytes
        )

    def images_in(self, room_bytes: float) -> int:
        """Count the images that fit; a number beyond all use where images cost nothing."""
        left = room_bytes - self.fixed_bytes
        if left < 0:
            return 0
        return int(min(left / self.image_bytes, 1e9)) if self.image_bytes > 0 else int(1e9)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The batch of one device, and what it rests on."""

    images: int
    trials: tuple[Trial, ...]
    """Those that fitted, in rising order."""
    line: Line | None
    limit: str
    """What ended the search: `memory`, `speed`, `time`, or `images`, of which there are no more."""


def round_down(images: int) -> int:
    """Bring a number to a size that devices like: multiples of 16 from 64 on, of 8 from 16, of 2 from 4."""
    unit = 16 if images >= 64 else 8 if images >= 16 else 2 if images >= 4 else 1
    return max(images // unit * unit, 1)


def choose(
    measure: Meter,
    *,
    room_bytes: int,
    most: int,
    usual: int,
    first: int = FIRST,
    is_late: Callable[[], bool] = lambda: False,
) -> Choice:
    """Find the largest batch that fits into `room_bytes`, or a smaller one that is as fast.

    most: images that there are for a device. usual: a size below which speed alone never goes, since batch norms want
    some images. first: the size that is tried first, or less where that does not fit. is_late: whether the search has
    taken so long that it ends once it has the usual size. What is returned has been tried. Raises UserError where not
    even one image fits.
    """
    search = _Search(measure, room_bytes, most)
    usual = min(usual, most)
    size = min(first, most)
    while not search.fits(size):
        if size == 1:
            raise UserError(
                "batch=auto: not even one image fits into the memory that may be taken; take a smaller imgsz or model, "
                "end what else takes memory, or raise memory= (a share of what is free)."
            )
        size //= 2
    limit = "images"
    falls = 0
    while size < search.ceiling:
        if size >= usual and is_late():
            limit = "time"
            break
        wanted = 2 * size if size >= usual or size < 2 * FIRST else usual
        room = search.room(wanted)
        target = min(wanted, room)
        if target < wanted and target < most:
            target = round_down(target)
            limit = "memory"
        if target <= size:
            break
        if search.fits(target):
            size = target
            if size > usual and search.is_flat(usual):
                limit = "speed"
                break
        else:
            limit, falls = "memory", falls + 1
            search.ceiling = max(round_down(int(target * _STEP_DOWN)), size)
            if falls == _FALLS:
                break
    if search.ceiling < most and limit == "images":
        limit = "memory"
    return search.choice(usual, limit)


class _Search:
    """Tries so far."""

    def __init__(self, measure: Meter, room_bytes: int, most: int) -> None:
        self._measure = measure
        self._room_bytes = room_bytes
        self._trials: dict[int, Trial] = {}
        self.ceiling = most

    def fits(self, images: int) -> bool:
        """Try a size."""
        trial = self._measure(images)
        if trial is None or trial.peak_bytes > self._room_bytes:
            self.ceiling = min(self.ceiling, max(images - 1, 1))
            return False
        self._trials[images] = trial
        return True

    @property
    def line(self) -> Line | None:
        return Line.through(list(self._trials.values())) if len(self._trials) > 1 else None

    def room(self, wanted: int) -> int:
        """Images that may be tried next: at most those that the line says fit."""
        line = self.line
        return min(wanted if line is None else line.images_in(self._room_bytes), self.ceiling)

    def is_flat(self, usual: int) -> bool:
        """Whether the largest size is no faster than a smaller one."""
        *smaller, largest = self._eligible(usual)
        return bool(smaller) and largest.images_per_s < SAME_SPEED * max(trial.images_per_s for trial in smaller)

    def choice(self, usual: int, limit: str) -> Choice:
        eligible = self._eligible(usual)
        best = max(trial.images_per_s for trial in eligible)
        chosen = next(trial for trial in eligible if trial.images_per_s * SAME_SPEED >= best)
        trials = tuple(self._trials[images] for images in sorted(self._trials))
        limit = limit if chosen is trials[-1] else "speed"
        return Choice(images=chosen.images, trials=trials, line=self.line, limit=limit)

    def _eligible(self, usual: int) -> list[Trial]:
        """Name the tries that speed may choose among, rising: from the usual size on, or the largest that fits."""
        sizes = sorted(self._trials)
        return [self._trials[images] for images in sizes if images >= min(usual, sizes[-1])]
