"""The ledger: where the seconds of a run went. Every time that is published is taken here.

Three tables, kept apart because their clocks run side by side:

```
main thread   |data|forward|loss|backward|optimiser|data|forward| ... |evaluation|checkpoint|   sums to the wall time
device            |#forward#|#loss#|##backward##|#optimiser#|        sampled with device events; need not sum
background    |decode|decode|render|render|decode| ...               seconds of loader threads; need not sum
```
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

T = TypeVar("T")

OTHER = "other"
DEVICE_WAIT = "device_wait"


@dataclass(frozen=True, kw_only=True)
class Lap:
    """What the ledger saw since the lap before; `sum(spans_s.values())` is `wall_s`."""

    wall_s: float
    spans_s: dict[str, float]
    device_ms: dict[str, float]
    """Mean milliseconds on the device per sampled span; empty on devices without a clock of their own."""


class DeviceClock(Protocol):
    """Times spans on a device without making the host wait."""

    def start(self, name: str) -> object:
        """Mark the beginning of a span on the device's queue; returns what `stop` takes."""

    def stop(self, mark: object) -> None:
        """Mark its end."""

    def read_ms(self) -> dict[str, float]:
        """Mean milliseconds per name since the last reading; may wait for the device."""


class CudaClock:
    """Device spans by CUDA events, for one step in every `every` steps."""

    def __init__(self, device: torch.device, *, every: int = 16) -> None:
        import torch

        self._stream = torch.cuda.current_stream(device)
        self._new_event: Callable[[], torch.cuda.Event] = lambda: torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._every = every
        self._seen: dict[str, int] = defaultdict(int)
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, name: str) -> object:
        """Record an event on the current stream for one call in every `every`."""
        self._seen[name] += 1
        if (self._seen[name] - 1) % self._every:
            return None
        begin, end = self._new_event(), self._new_event()
        begin.record(self._stream)
        return name, begin, end

    def stop(self, mark: object) -> None:
        """Record the closing event of a sampled span."""
        if isinstance(mark, tuple):
            name, begin, end = mark
            end.record(self._stream)
            self._marks.append((name, begin, end))

    def read_ms(self) -> dict[str, float]:
        """Mean of the sampled spans; waits until the last of them has ended."""
        times: dict[str, list[float]] = defaultdict(list)
        for name, begin, end in self._marks:
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
        self._marks.clear()
        return {name: sum(values) / len(values) for name, values in times.items()}


class Ledger:
    """Spans of the main thread, exclusive of each other: an inner span takes its time from the outer one.

    Whatever lies in no span is counted as `other`, so the spans of a lap sum to its wall time by construction.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.perf_counter, device_clock: DeviceClock | None = None
    ) -> None:
        self._clock = clock
        self._device_clock = device_clock
        self._names: list[str] = [OTHER]
        self._closed = 0
        self._spans_s: dict[str, float] = defaultdict(float)
        self._mark = self._lap_start = clock()

    def _settle(self) -> float:
        """Book the time since the last mark on the innermost open span."""
        now = self._clock()
        self._spans_s[self._names[-1]] += now - self._mark
        self._mark = now
        return now

    @contextmanager
    def span(self, name: str, *, on_device: bool = False) -> Iterator[None]:
        """Book what happens inside on `name`; with `on_device` its time on the device is sampled as well."""
        if self._closed:
            yield
            return
        self._settle()
        self._names.append(name)
        mark = self._device_clock.start(name) if on_device and self._device_clock else None
        try:
            yield
        finally:
            if mark is not None and self._device_clock:
                self._device_clock.stop(mark)
            self._settle()
            self._names.pop()

    @contextmanager
    def closed_span(self, name: str) -> Iterator[None]:
        """Book all that happens inside on `name`, whatever spans are opened there; nothing is marked on the device.

        A step that is being captured must not leave marks of the device's clock in its graph.
        """
        with self.span(name):
            self._closed += 1
            try:
                yield
            finally:
                self._closed -= 1

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Iterate, booking the time spent in getting each item on `name`."""
        iterator = iter(items)
        while True:
            with self.span(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @property
    def outermost(self) -> str:
        """Name of the outermost open span, `other` where none is open; may be asked from another thread."""
        names = self._names[:2]
        return names[-1]

    def lap(self) -> Lap:
        """Close the books: return what was seen since the last lap and start afresh. Open spans stay open."""
        device_ms: dict[str, float] = {}
        if self._device_clock:
            with self.span(DEVICE_WAIT):
                device_ms = self._device_clock.read_ms()
        now = self._settle()
        lap = Lap(wall_s=now - self._lap_start, spans_s=dict(self._spans_s), device_ms=device_ms)
        self._spans_s.clear()
        self._lap_start = now
        return lap
