"""A record of a bench, made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from paceline.planning.record import (
    BenchRecord,
    DataRecord,
    EnergyRecord,
    EvaluationBenchRecord,
    LimitsRecord,
    MachineRecord,
    MemoryRecord,
    NodeRecord,
    PartRecord,
    RanksRecord,
    StepRecord,
)
from paceline.planning.spread import Spread


def spread(median: float, count: int = 9) -> Spread:
    return Spread(median=median, low=0.99 * median, high=1.02 * median, count=count)


def record(**changes: Any) -> BenchRecord:
    whole = BenchRecord(
        options={"model": "yolo11n", "imgsz": 640, "batch": 16, "device": "cpu", "json": "", "seconds": 5.0},
        machine=MachineRecord(
            device="A [fast] chip",
            processor="A chip",
            cores=2,
            memory_gb=24.0,
            threads=2,
            load_average=0.5,
            python="3.11.7",
            versions={"torch": "2.13.0", "paceline": "0.1.0"},
        ),
        model="yolo11n",
        parameters=2_624_080,
        gflops=6.48,
        plan="bf16, channels-last",
        precision="bf16",
        limits=LimitsRecord(
            operations_per_s={"fp32": 9e10, "bf16": 1.5e11}, best={"fp32": "a", "bf16": "b"}, bytes_per_s=2e10
        ),
        step=StepRecord(
            images=16,
            images_per_s=spread(20.0),
            whole_ms=spread(800.0),
            parts={
                "forward": PartRecord(measured_ms=spread(250.0), limit_ms=100.0, attainable_ms=150.0),
                "loss": PartRecord(measured_ms=spread(20.0), limit_ms=1.0, attainable_ms=2.0),
                "backward": PartRecord(measured_ms=spread(500.0), limit_ms=200.0, attainable_ms=300.0),
                "optimiser": PartRecord(measured_ms=None, limit_ms=4.0, attainable_ms=5.0),
            },
            limit_ms=305.0,
            attainable_ms=457.0,
            operations=3.1e11,
            bytes=8e9,
            memory_share=0.4,
        ),
        nodes=tuple(
            NodeRecord(
                node=number,
                kind="ConvUnit",
                measured_ms=10.0 + number,
                limit_ms=0.0 if number == 11 else 5.0,
                attainable_ms=6.0,
            )
            for number in range(12)
        ),
        memory=MemoryRecord(kind="resident", peak_bytes=2**30, reserved_bytes=2**31),
        evaluation=EvaluationBenchRecord(
            network_images_per_s=spread(100.0), images_per_s=spread(80.0), limit_images_per_s=300.0, candidates=1000.0
        ),
        energy=EnergyRecord(joules_per_image=None, source="not measured: nothing counts"),
        data=DataRecord(
            data="a/data.yaml",
            images=100,
            drawn_by="host",
            loader_images_per_s=spread(300.0),
            images_per_s=spread(19.0),
            waiting_share=spread(0.01),
        ),
        ranks=RanksRecord(devices=2, alone_ms=spread(700.0), waiting_share=spread(0.125)),
        wall_s=60.0,
        notes=("A note.",),
    )
    return replace(whole, **changes)
