"""A comparison of two benches: the old figures beside the new ones. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.planning.spread import Spread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.planning.record import BenchRecord

NO_MATTER = frozenset({"json", "compare", "seconds", "workers"})
"""Options that may differ between benches that can be compared."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of both benches."""

    name: str
    unit: str
    old: float
    new: float
    ratio: Spread
    """New over old."""
    more_is_better: bool

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `` where the intervals do not tell the two apart, or there are none."""
        if self.ratio.low <= 1 <= self.ratio.high or self.ratio.count < 2:
            return ""
        return "better" if (self.ratio.median > 1) == self.more_is_better else "worse"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two benches have in common, and what keeps them from being compared."""

    rows: tuple[Row, ...]
    differences: tuple[str, ...]
    """One phrase for each thing of machine, versions, options or plan that is not the same."""


def compare(old: BenchRecord, new: BenchRecord) -> Comparison:
    """Put the figures that both have beside each other."""
    return Comparison(rows=tuple(_rows(old, new)), differences=tuple(_differences(old, new)))


def _rows(old: BenchRecord, new: BenchRecord) -> Iterator[Row]:
    yield _row("step alone", "images/s", old.step.images_per_s, new.step.images_per_s, more_is_better=True)
    yield _row("whole step", "ms", old.step.whole_ms, new.step.whole_ms)
    for name, part in new.step.parts.items():
        before = old.step.parts.get(name)
        if before is not None and before.measured_ms is not None and part.measured_ms is not None:
            yield _row(name, "ms", before.measured_ms, part.measured_ms)
    if old.data is not None and new.data is not None:
        loaders = old.data.loader_images_per_s, new.data.loader_images_per_s
        yield _row("loader alone", "images/s", *loaders, more_is_better=True)
        yield _row("end to end", "images/s", old.data.images_per_s, new.data.images_per_s, more_is_better=True)
    if old.evaluation is not None and new.evaluation is not None:
        evaluations = old.evaluation.images_per_s, new.evaluation.images_per_s
        yield _row("evaluation", "images/s", *evaluations, more_is_better=True)
    memory = (float(record.memory.peak_bytes) / 2**20 for record in (old, new))
    yield _row("peak memory", "MiB", *(_single(value) for value in memory))
    energy = old.energy.joules_per_image, new.energy.joules_per_image
    if energy[0] is not None and energy[1] is not None:
        yield _row("energy", "J/image", _single(energy[0]), _single(energy[1]))
    bandwidth = _single(old.limits.bytes_per_s / 1e9), _single(new.limits.bytes_per_s / 1e9)
    yield _row("copy bandwidth", "GB/s", *bandwidth, more_is_better=True)
    for name, rate in new.limits.operations_per_s.items():
        if name in old.limits.operations_per_s:
            rates = _single(old.limits.operations_per_s[name] / 1e12), _single(rate / 1e12)
            yield _row(f"matrix rate {name}", "TFLOP/s", *rates, more_is_better=True)


def _row(name: str, unit: str, old: Spread, new: Spread, *, more_is_better: bool = False) -> Row:
    ratio = new.over(old) if old.low > 0 else Spread(median=1.0, low=1.0, high=1.0, count=1)
    return Row(name=name, unit=unit, old=old.median, new=new.median, ratio=ratio, more_is_better=more_is_better)


def _single(value: float) -> Spread:
    return Spread(median=value, low=value, high=value, count=1)


def _differences(old: BenchRecord, new: BenchRecord) -> Iterator[str]:
    for name in ("device", "processor", "cores", "threads", "python"):
        before, now = getattr(old.machine, name), getattr(new.machine, name)
        if before != now:
            yield f"{name} {before} -> {now}"
    for name in sorted(old.machine.versions.keys() | new.machine.versions.keys()):
        before, now = (record.machine.versions.get(name, "none") for record in (old, new))
        if before != now:
            yield f"{name} {before} -> {now}"
    for name in sorted((old.options.keys() | new.options.keys()) - NO_MATTER):
        before, now = old.options.get(name), new.options.get(name)
        if before != now:
            yield f"{name}={before} -> {name}={now}"
    if old.plan != new.plan:
        yield f"plan {old.plan} -> {new.plan}"
