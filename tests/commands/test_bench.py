"""`paceline bench` on a CPU, small: the record is whole, and what is not possible is answered in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from recorder import Recorder

from paceline.batch import Batch
from paceline.cli.main import main
from paceline.commands import bench_step
from paceline.commands.bench import bench, ranks_to_launch
from paceline.commands.bench_evaluation import CLUSTERS, POINTS, _made_up_scores
from paceline.commands.bench_subject import BenchSubject
from paceline.commands.step_choice import RunStep
from paceline.errors import UserError
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.options import BenchOptions
from paceline.parallel.config import LimitsConfig
from paceline.parallel.process_group import joined
from paceline.parallel.single import SingleEngine
from paceline.planning import limits
from paceline.planning.noise import noise_batch
from paceline.planning.record import BenchRecord
from paceline.planning.roofline import PARTS
from paceline.training.choice import StepChoice
from paceline.training.compiling import Compiler
from paceline.training.plan import StepPlan
from paceline.training.precision import Precision

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.ledger import Ledger
    from paceline.models.graph import DetectionModel

SMALL = {
    "model": "yolo11n",
    "imgsz": 64,
    "batch": 2,
    "device": "cpu",
    "amp": "off",
    "tune_step": "off",
    "seconds": 0.01,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = limits._Sizes(squares=(64,), convolutions=((1, 16, 16),), copy_bytes=1 << 20)
    monkeypatch.setattr(limits, "_SIZES", {"cpu": sizes})
    monkeypatch.chdir(tmp_path)


def test_a_bench_of_noise_has_every_figure() -> None:
    record = bench(BenchOptions.from_flat(SMALL))
    assert tuple(record.step.parts) == PARTS
    measured = [part.measured_ms for part in record.step.parts.values()]
    assert all(value is not None and value.median > 0 for value in measured)
    assert record.step.whole_ms.count >= 6
    assert record.step.images_per_s.median == pytest.approx(2e3 / record.step.whole_ms.median)
    assert 0 < record.step.limit_ms < record.step.attainable_ms
    assert sum(part.limit_ms for part in record.step.parts.values()) == pytest.approx(record.step.limit_ms)
    assert [node.node for node in record.nodes] == list(range(24))
    assert all(node.measured_ms > 0 for node in record.nodes)
    assert record.memory.peak_bytes > 0
    assert record.evaluation is not None
    assert record.evaluation.candidates > 0
    assert record.data is None
    assert record.ranks is None
    assert record.energy.joules_per_image is None or record.energy.joules_per_image > 0
    assert record.options["imgsz"] == 64
    assert record.precision == "fp32"


def test_a_data_set_adds_the_loader_and_the_whole(squares: Path) -> None:
    options = BenchOptions.from_flat(SMALL | {"data": str(squares), "workers": 1, "cache": "ram", "batch": 4})
    record = bench(options)
    assert record.data is not None
    assert record.data.drawn_by == "host"
    assert record.data.loader_images_per_s.median > record.data.images_per_s.median > 0
    assert 0 <= record.data.waiting_share.median <= 1
    assert record.step.images == 4


def test_the_command_prints_writes_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{name}={value}" for name, value in SMALL.items()]
    file = tmp_path / "deep" / "a.json"
    assert main(["bench", *words, f"json={file}"]) == 0
    first = capsys.readouterr().out
    assert "step alone" in first
    assert "before" not in first
    assert BenchRecord.read(file).model == "yolo11n"
    assert main(["bench", *words, "batch=4", f"compare={file}"]) == 0
    second = capsys.readouterr().out
    assert "now / before" in second
    assert "batch=2 -> batch=4" in second


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "yolo12n"}, "There is no model"),
        ({"model": "missing.safetensors"}, "do not exist"),
        ({"imgsz": 100}, "nearest are 96 and 128"),
        ({"imgsz": 32, "batch": 1}, "batch norms a single value"),
        ({"seconds": 0}, "must be above 0"),
        ({"device": "cpu", "devices": 3, "batch": 4}, "does not divide into 3 equal shares"),
        ({"cache": "ram"}, "name one by data="),
        ({"workers": 2}, "name one by data="),
        ({"batch": "auto"}, "give bench a number"),
        ({"batch": 0.7}, "give bench a number"),
        ({"num_classes": 3, "data": "shapes"}, "leave it out"),
        ({"amp": "fp16"}, "amp=fp16 needs a GPU"),
        ({"json": "."}, "is a folder"),
        ({"compare": "missing.json"}, "check the path"),
        ({"half": True}, "half=True is not taken"),
        ({"sekonds": 3}, "did you mean seconds?"),
    ],
)
def test_impossible_options_are_one_sentence(
    changes: dict[str, object], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *(f"{name}={value}" for name, value in (SMALL | changes).items())]) == 2
    answer = capsys.readouterr().err.strip().splitlines()[-1]
    assert answer.startswith("paceline: ")
    assert sentence in answer


@pytest.mark.parametrize("kernels", [True, False])
def test_kernels_are_compiled_ahead_as_in_training(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> None:
    """Before the first step, for the network that it is taken with."""
    done: list[str] = []

    def compile_ahead(network: DetectionModel, criterion: object, amp_dtype: object) -> None:
        assert callable(criterion)
        done.append(f"{network.name} {amp_dtype}")

    def default(plan: StepPlan, why: str) -> StepChoice:
        return StepChoice(plan=replace(plan, kernels=kernels), source="default", text=why)

    take = bench_step.StepBench.take
    monkeypatch.setattr("paceline.commands.step_choice.compile_ahead", compile_ahead)
    monkeypatch.setattr("paceline.training.choice._default", default)
    monkeypatch.setattr(bench_step.StepBench, "take", lambda *args: (done.append("step"), take(*args)))
    bench(BenchOptions.from_flat(SMALL | {"tune_step": "off", "amp": "bf16"}))
    assert done[: 1 + kernels] == (["yolo11n torch.bfloat16"] if kernels else []) + ["step"]
    assert "yolo11n torch.bfloat16" not in done[1:]


def test_a_batch_larger_than_the_set_is_refused(squares: Path) -> None:
    with pytest.raises(UserError, match="is more than the"):
        bench(BenchOptions.from_flat(SMALL | {"data": str(squares), "batch": 999}))


def test_memory_that_does_not_suffice_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_step.StepBench, "take", refuse)
    with pytest.raises(UserError, match="batch=2 at 64 px does not fit"):
        bench(BenchOptions.from_flat(SMALL))


def test_processes_are_counted_before_anything_starts() -> None:
    assert ranks_to_launch(BenchOptions.from_flat(SMALL)) == 1
    assert ranks_to_launch(BenchOptions.from_flat(SMALL | {"devices": 2})) == 2


def test_made_up_scores_find_clusters() -> None:
    scores = _made_up_scores(torch.zeros(2, 8400, 80, dtype=torch.bfloat16))
    assert scores.dtype == torch.bfloat16
    above = (scores.float().sigmoid() > 0.001).flatten(1).sum(dim=1)
    assert bool((above <= CLUSTERS * POINTS).all())
    assert bool((above > 0.8 * CLUSTERS * POINTS).all())
    assert _made_up_scores(torch.zeros(1, 21, 2)).isfinite().all()  # fewer points than a cluster has


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_plan_is_carried_out(monkeypatch: pytest.MonkeyPatch, channels_last: bool) -> None:
    plan = StepPlan(precision=Precision(name="bf16"), channels_last=channels_last, compile=True, threads=1)
    monkeypatch.setattr(RunStep, "choose", lambda step: StepChoice(plan=plan, source="default", text=""))
    monkeypatch.setattr(RunStep, "compiler", lambda step, plan, keeps: Compiler(backend="eager"))
    seen: list[tuple[bool, int, bool]] = []
    take = bench_step.StepBench.take

    def look(step: bench_step.StepBench, batch: Batch | None = None) -> None:
        last = step.batch.images.is_contiguous(memory_format=torch.channels_last)
        is_compiled = any(node._compiled_call_impl is not None for node in step.engine.network.model.values())
        seen.append((last, torch.get_num_threads(), is_compiled))
        take(step, batch)

    monkeypatch.setattr(bench_step.StepBench, "take", look)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # from which the plan's number can be told
    try:
        record = bench(BenchOptions.from_flat(SMALL | {"amp": "auto"}))
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {(channels_last, 1, True)}
    assert record.plan == str(plan)
    assert record.precision == "bf16"
    assert record.machine.threads == 1
    assert "compiled" in record.plan
    assert not any("Nothing was compiled" in note for note in record.notes)


def test_a_recorded_step_has_the_parts_of_the_same_step_without() -> None:
    network = build_model("yolo11n", 3)
    criterion = DetectionLoss(LossConfig(), 3, fixed_shapes=True)

    def engine_of(ledger: Ledger) -> SingleEngine:
        return SingleEngine(network, criterion, amp_dtype=None, clip=10.0, ledger=ledger)

    recorder = Recorder()
    batch = noise_batch(2, 64, 3, dtype=None, device=torch.device("cpu"))
    step = bench_step.StepBench(engine_of, batch, torch.device("cpu"), capture=recorder)
    assert step.is_recorded
    assert len(recorder.recordings) == 1
    times = step.measure(0.0)
    assert times.parts_s.keys() == set(PARTS)
    assert len(recorder.recordings) == 1  # steps by part were not recorded


class _Device:
    """A device's clock: names what was asked to be timed."""

    def __init__(self, device: torch.device, *, every: int) -> None:
        assert every == 1
        self.started: list[str] = []

    def start(self, name: str) -> object:
        self.started.append(name)
        return name

    def stop(self, mark: object) -> None:
        assert mark is None or mark in self.started

    def read_ms(self) -> dict[str, float]:
        spans = {"forward": 3.0, "loss": 1.0, "backward": 5.0, "optimiser": 2.0, "ema": 0.5}
        return {name: spans[name] for name in dict.fromkeys(self.started)}


def test_on_a_device_whole_steps_have_no_events_within(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps run on the CPU; only the clock is that of another device."""
    monkeypatch.setattr(bench_step, "CudaClock", _Device)
    network = build_model("yolo11n", 3)
    batch = noise_batch(2, 64, 3, dtype=None, device=torch.device("cpu"))

    def engine_of(ledger: Ledger) -> SingleEngine:
        return SingleEngine(network, DetectionLoss(LossConfig(), 3), amp_dtype=None, clip=10.0, ledger=ledger)

    step = bench_step.StepBench(engine_of, batch, torch.device("cpu"), sampled=True)
    assert step.measure(0.0).parts_s.keys() == set(PARTS)
    switch = step._switch
    assert switch is not None
    clock = switch._clock
    assert isinstance(clock, _Device)
    clock.started.clear()
    step.take()
    assert clock.started == []
    times = step.measure(0.0)
    per_step = len(PARTS)
    assert len(clock.started) % (per_step * bench_step.STEPS_BETWEEN_WAITS) == 0
    assert times.parts_s["optimiser"].median == pytest.approx(2.0e-3)
    assert times.parts_s["ema"].median == pytest.approx(0.5e-3)
    assert times.whole_s.median > 0


@pytest.mark.slow
def test_two_processes_take_a_bench_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "two.json"
    words = [f"{name}={value}" for name, value in (SMALL | {"devices": 2, "batch": 4}).items()]
    assert main(["bench", *words, f"json={file}"]) == 0
    record = BenchRecord.from_json(json.loads(file.read_text()), where="there")
    assert record.ranks is not None
    assert record.ranks.devices == 2
    assert 0 <= record.ranks.waiting_share.median < 1
    assert record.step.images == 4
    assert record.step.parts["exchange"].measured_ms is not None


def test_batches_of_a_set_keep_their_memory(squares: Path) -> None:
    options = BenchOptions.from_flat(SMALL | {"data": str(squares), "workers": 1, "cache": "ram", "batch": 4})
    with joined(backend="gloo", limits=LimitsConfig()) as group:
        data = BenchSubject(options, group, torch.device("cpu")).data()
    assert data is not None
    with data:
        batch = data.first_batch()
        before = batch.images.clone()
        record = data.measure(lambda batch: None, 0.01)
        assert torch.equal(batch.images, before)
    assert isinstance(batch, Batch)
    assert record.images_per_s.median > 0
