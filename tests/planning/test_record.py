from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from bench_records import record, spread

from paceline.errors import UserError
from paceline.planning.comparison import compare
from paceline.planning.record import BenchRecord, EnergyRecord, MemoryRecord

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": None, "ranks": None, "evaluation": None, "nodes": (), "notes": ()},
        {"energy": EnergyRecord(joules_per_image=1.5, source="a counter")},
        {"memory": MemoryRecord(kind="allocator", peak_bytes=1, reserved_bytes=2)},
    ],
)
def test_what_is_written_is_read(tmp_path: Path, changes: dict[str, object]) -> None:
    written = record(**changes)
    written.write(tmp_path / "bench.json")
    assert BenchRecord.read(tmp_path / "bench.json") == written


def test_files_that_are_no_bench_are_answered_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    with pytest.raises(UserError, match="check the path"):
        BenchRecord.read(file)
    file.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        BenchRecord.read(file)
    file.write_text("[1]")
    with pytest.raises(UserError, match="is no record of a bench"):
        BenchRecord.read(file)
    record().write(file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(UserError, match="format 99"):
        BenchRecord.read(file)
    for damage in ({"step": 3}, {"step": {}}, {"colour": "red"}, {"model": 7}):
        file.write_text(json.dumps(content | damage))
        with pytest.raises(UserError, match="damaged"):
            BenchRecord.read(file)


def test_a_bench_beside_itself_has_ratios_of_one_and_no_differences() -> None:
    comparison = compare(record(), record())
    assert [row.ratio.median for row in comparison.rows] == [1.0] * len(comparison.rows)
    assert {row.verdict for row in comparison.rows} == {""}
    assert comparison.differences == ()


def test_a_change_beyond_the_spread_is_called_by_its_direction() -> None:
    old, new = record(), record()
    faster = replace(new.step, images_per_s=spread(40.0), whole_ms=spread(400.0))
    rows = {row.name: row for row in compare(old, replace(new, step=faster)).rows}
    assert rows["step alone"].ratio.median == 2
    assert rows["step alone"].verdict == rows["whole step"].verdict == "better"
    assert rows["forward"].verdict == ""
    back = {row.name: row for row in compare(replace(new, step=faster), old).rows}
    assert back["step alone"].verdict == back["whole step"].verdict == "worse"
    within = replace(new.step, images_per_s=spread(20.1))
    assert {row.name: row for row in compare(old, replace(new, step=within)).rows}["step alone"].verdict == ""


def test_single_figures_get_a_ratio_and_no_verdict() -> None:
    new = record(memory=MemoryRecord(kind="resident", peak_bytes=2**31, reserved_bytes=2**32))
    (row,) = [row for row in compare(record(), new).rows if row.name == "peak memory"]
    assert (row.ratio.median, row.verdict) == (2.0, "")


def test_only_figures_of_both_are_compared() -> None:
    rows = {row.name for row in compare(record(data=None), record()).rows}
    assert "end to end" not in rows
    assert "optimiser" not in rows  # which was not measured
    assert "energy" not in rows
    both = record(energy=EnergyRecord(joules_per_image=2.0, source="a"))
    assert "energy" in {row.name for row in compare(both, both).rows}


def test_what_differs_is_named() -> None:
    old, new = record(), record()
    machine = replace(new.machine, device="Another", versions={"torch": "2.14.0", "CUDA": "12.8"}, load_average=9.0)
    changed = replace(
        new, machine=machine, options=new.options | {"batch": 32, "json": "x", "seconds": 9.0}, plan="fp32"
    )
    assert compare(old, changed).differences == (
        "device A [fast] chip -> Another",
        "CUDA none -> 12.8",
        "paceline 0.1.0 -> none",
        "torch 2.13.0 -> 2.14.0",
        "batch=16 -> batch=32",
        "plan bf16, channels-last -> fp32",
    )
