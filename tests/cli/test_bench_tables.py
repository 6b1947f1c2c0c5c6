from __future__ import annotations

from dataclasses import replace
from io import StringIO

from bench_records import record
from rich.console import Console

from paceline.cli.bench_tables import print_bench, print_comparison
from paceline.planning.comparison import compare
from paceline.planning.record import BenchRecord, EnergyRecord, MemoryRecord


def printed(found: BenchRecord) -> str:
    out = StringIO()
    print_bench(found, Console(file=out, width=100))
    return out.getvalue()


def test_every_figure_is_printed() -> None:
    text = printed(record())
    assert "on 2 x A [fast] chip" in text  # brackets are no markup
    for words in ("step alone", "loader alone", "end to end", "evaluation with NMS", "12.5% of a step", "A note."):
        assert words in text
    assert "Beyond the attainable 457.0 ms a step spends 343.0 ms: backward 200.0 ms, forward 100.0 ms" in text
    assert "not measured: nothing counts" in text
    assert text.count("ConvUnit") == 10
    assert "0 ConvUnit" not in text.replace("10 ConvUnit", "")  # the cheapest two are left out


def test_what_was_not_measured_is_left_out() -> None:
    text = printed(record(data=None, ranks=None, evaluation=None, nodes=()))
    for words in ("loader", "end to end", "evaluation", "Exchange", "ConvUnit", "candidates"):
        assert words not in text


def test_memory_and_energy_of_a_gpu() -> None:
    memory = MemoryRecord(kind="allocator", peak_bytes=2**30, reserved_bytes=2**31)
    text = printed(record(memory=memory, energy=EnergyRecord(joules_per_image=1.234, source="NVML")))
    assert "1.00 GiB allocated, 2.00 GiB reserved" in text
    assert "1.23 J per image (NVML)" in text


def test_a_comparison_warns_of_what_differs() -> None:
    out = StringIO()
    other = replace(record(), plan="fp32")
    print_comparison(compare(record(), other), "old.json", Console(file=out, width=120))
    text = out.getvalue()
    assert "beside old.json" in text
    assert "1.000" in text
    assert "not the same in both: plan bf16, channels-last -> fp32." in text
