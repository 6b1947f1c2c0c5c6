"""The figures of a bench as tables on the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paceline.cli.wording import plural, rate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.planning.comparison import Comparison
    from paceline.planning.record import BenchRecord, PartRecord
    from paceline.planning.spread import Spread

_MOST_NODES = 10
_WORDS = {"ema": "average"}


def print_bench(record: BenchRecord, console: Console | None = None) -> None:
    """Print the figures, what they were predicted to be, and where the difference lies."""
    console = Console(highlight=False) if console is None else console
    options, machine = record.options, record.machine
    devices = f"{record.ranks.devices} x " if record.ranks else ""
    console.print(
        f"[bold]{escape(record.model)}[/bold], {options['imgsz']} px, batch {options['batch']} on {devices}"
        f"{escape(machine.device)} ({plural(machine.cores, 'core')}, {plural(machine.threads, 'thread')}): "
        f"{escape(record.plan)}",
        soft_wrap=True,
    )
    for table in (_rates(record), _parts(record), _nodes(record)):
        if table is not None:
            console.print()
            console.print(table)
    console.print()
    for line in _sentences(record):
        console.print(line, soft_wrap=True)


def _rates(record: BenchRecord) -> Table:
    table = _table("images/s", "95 %", "attainable", "limit", "of limit", first="")
    step = record.step

    def add(name: str, measured: Spread, limit: float | None = None, attainable: float | None = None) -> None:
        bounds = [rate(value) if value is not None else "" for value in (attainable, limit)]
        share = f"{measured.median / limit:.0%}" if limit else ""
        table.add_row(name, rate(measured.median), _interval(measured), *bounds, share)

    per_s = 1e3 * step.images
    add("step alone", step.images_per_s, per_s / step.limit_ms, per_s / step.attainable_ms)
    if record.data is not None:
        add("loader alone", record.data.loader_images_per_s)
        add("end to end", record.data.images_per_s)
    if record.evaluation is not None:
        add("evaluation, network", record.evaluation.network_images_per_s, record.evaluation.limit_images_per_s)
        add("evaluation with NMS", record.evaluation.images_per_s)
    return table


def _parts(record: BenchRecord) -> Table:
    table = _table("ms", "95 %", "attainable", "limit", "of limit", "of rest", first="a step")
    step = record.step
    whole_ms = step.whole_ms.median
    rest_ms = whole_ms - step.attainable_ms

    def add(name: str, measured: Spread | None, limit_ms: float, attainable_ms: float, style: str = "") -> None:
        if measured is None:
            table.add_row(name, "", "", _ms(attainable_ms), _ms(limit_ms), "", "", style=style)
            return
        share = f"{limit_ms / measured.median:.0%}" if measured.median > 0 and limit_ms > 0 else ""
        rest = f"{(measured.median - attainable_ms) / rest_ms:.0%}" if rest_ms > 0 else ""
        figures = _ms(measured.median), _interval(measured, digits=True), _ms(attainable_ms), _ms(limit_ms)
        table.add_row(name, *figures, share, rest, style=style)

    for name, part in step.parts.items():
        add(_WORDS.get(name, name), part.measured_ms, part.limit_ms, part.attainable_ms)
    add("whole", step.whole_ms, step.limit_ms, step.attainable_ms, "bold")
    return table


def _nodes(record: BenchRecord) -> Table | None:
    """Draw the most expensive nodes, which are timed forward and backward by themselves."""
    if not record.nodes:
        return None
    table = _table("ms", "attainable", "limit", "of limit", "over", first="node")
    for node in sorted(record.nodes, key=lambda entry: entry.measured_ms, reverse=True)[:_MOST_NODES]:
        share = f"{node.limit_ms / node.measured_ms:.0%}" if node.limit_ms > 0 else ""
        over_ms = node.measured_ms - node.attainable_ms
        figures = _ms(node.measured_ms), _ms(node.attainable_ms), _ms(node.limit_ms), share, _ms(over_ms)
        table.add_row(f"{node.node} {node.kind}", *figures)
    return table


def _sentences(record: BenchRecord) -> Iterator[str]:
    step, limits = record.step, record.limits
    matrices = ", ".join(
        f"{name} {_big(value, 'FLOP/s')} ({limits.best[name]})" for name, value in limits.operations_per_s.items()
    )
    yield f"Limits, measured here: {matrices}; a copy moves {_big(limits.bytes_per_s, 'B/s')}."
    seconds = step.whole_ms.median / 1e3
    operations, moved = step.operations / seconds, step.bytes / seconds
    yield (
        f"The step does {_big(operations, 'FLOP/s')} of arithmetic "
        f"({operations / limits.operations_per_s[record.precision]:.0%} of that rate) and has to move "
        f"{_big(moved, 'B/s')} ({moved / limits.bytes_per_s:.0%}); {step.memory_share:.0%} of its limit is memory."
    )
    largest = _largest_rest(record)
    if largest:
        yield largest
    memory = record.memory
    if memory.kind == "allocator":
        yield f"Peak memory: {_gib(memory.peak_bytes)} allocated, {_gib(memory.reserved_bytes)} reserved."
    else:
        grown, whole = _gib(memory.peak_bytes), _gib(memory.reserved_bytes)
        yield f"Peak memory: the step made the process grow by {grown} to {whole}."
    if record.energy.joules_per_image is None:
        yield f"Energy: {escape(record.energy.source)}."
    else:
        yield f"Energy: {record.energy.joules_per_image:.3g} J per image ({escape(record.energy.source)})."
    if record.ranks is not None:
        share = record.ranks.waiting_share
        yield (
            f"Exchange and waiting: {share.median:.1%} of a step ({share.low:.1%} to {share.high:.1%}); the same share "
            f"of the batch without takes {record.ranks.alone_ms.median:.1f} ms."
        )
    if record.data is not None:
        share = record.data.waiting_share
        yield (
            f"End to end is {record.data.images_per_s.median / step.images_per_s.median:.0%} of the step alone; "
            f"{share.median:.0%} of it waits for batches, which the {record.data.drawn_by} draws."
        )
    if record.evaluation is not None:
        yield f"Suppression had {record.evaluation.candidates:,.0f} candidates per image."
    for note in record.notes:
        yield f"[bright_black]{escape(note)}[/bright_black]"


def _largest_rest(record: BenchRecord) -> str:
    """Say where most of what is beyond the attainable goes."""

    def over(part: PartRecord) -> float:
        return part.measured_ms.median - part.attainable_ms if part.measured_ms else 0.0

    step = record.step
    named = sum(over(part) for part in step.parts.values())
    rest_ms = step.whole_ms.median - step.attainable_ms
    parts = {_WORDS.get(name, name): over(part) for name, part in step.parts.items() if part.measured_ms}
    if not parts or rest_ms <= 0:
        return ""
    unnamed = rest_ms - named
    if unnamed > 0:
        parts["between the parts"] = unnamed
    shares = sorted(parts.items(), key=lambda entry: entry[1], reverse=True)
    text = ", ".join(f"{name} {value:.1f} ms" for name, value in shares if value > 0)
    return f"Beyond the attainable {step.attainable_ms:.1f} ms a step spends {rest_ms:.1f} ms: {text}."


def print_comparison(comparison: Comparison, name: str, console: Console | None = None) -> None:
    """Print old figures beside new ones, and what keeps them from being compared."""
    console = Console(highlight=False) if console is None else console
    table = _table("before", "now", "now / before", "95 %", "", first=f"beside {escape(name)}")
    for row in comparison.rows:
        interval = f"{row.ratio.low:.3f}–{row.ratio.high:.3f}" if row.ratio.count > 1 else ""
        figures = f"{row.old:,.4g}", f"{row.new:,.4g}", f"{row.ratio.median:.3f}"
        table.add_row(f"{row.name}, {row.unit}", *figures, interval, row.verdict)
    console.print()
    console.print(table)
    if comparison.differences:
        console.print(
            f"[yellow]warning:[/yellow] not the same in both: {escape('; '.join(comparison.differences))}.",
            soft_wrap=True,
        )


def _table(*headings: str, first: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bright_black")
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _interval(value: Spread, *, digits: bool = False) -> str:
    if value.count < 2:
        return ""
    write = _ms if digits else rate
    return f"{write(value.low)}–{write(value.high)}"


def _ms(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def _big(value: float, unit: str) -> str:
    """Write with the prefix that fits: `1.2 T`, `345 G`."""
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
