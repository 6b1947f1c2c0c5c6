"""The choice of the step: what is timed, what is remembered, and whether compilation pays."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline.errors import UserError
from paceline.training.candidates import StepTask, candidates, with_threads
from paceline.training.choice import QUICK_S, StepChoice, choose_step, settle
from paceline.training.machine import Machine, processor_of, quota_of
from paceline.training.plan import StepPlan
from paceline.training.plan_memory import Measured, Measurement, PlanMemory
from paceline.training.precision import Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FP32, BF16 = Precision(name="fp32"), Precision(name="bf16")
MACHINE = Machine(name="Test CPU", physical_cores=2, logical_cores=2, bf16=True, fp16=False)
TASK = StepTask(
    device=torch.device("cpu"), model="yolo11n", num_classes=3, imgsz=640, batch=16, boxes=32, steps=50_000, ranks=2
)


def usual(plan: StepPlan) -> float:
    """Milliseconds for one image."""
    ms = 10.0 if plan.precision == BF16 else 20.0
    return ms * (0.8 if plan.channels_last else 1.0) * (0.75 if plan.compile else 1.0) * (0.5 if plan.graphs else 1.0)


@dataclass
class FakeMachine:
    """A clock, and trials whose steps last as `speed` says."""

    speed: Callable[[StepPlan], float] = usual
    compile_s: float = 90.0
    now: float = 0.0
    trials: list[tuple[StepPlan, int]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    @contextmanager
    def open(self, images: int) -> Iterator[_FakeTrials]:
        yield _FakeTrials(self, images)


@dataclass
class _FakeTrials:
    machine: FakeMachine
    images: int
    compile_s: float = 0.0
    compiled: set[StepPlan] = field(default_factory=set)

    def seconds(self, plan: StepPlan) -> float:
        machine = self.machine
        machine.trials.append((plan, self.images))
        if plan.compile and plan not in self.compiled:
            self.compiled.add(plan)
            self.compile_s += machine.compile_s
            machine.now += machine.compile_s
        seconds = machine.speed(plan) * self.images / 1000
        machine.now += 0.0 if math.isinf(seconds) else seconds
        return seconds

    def leave(self, plan: StepPlan) -> None:
        pass


def choose(
    folder: Path, machine: FakeMachine, tune: Any = "quick", task: StepTask = TASK, on: Machine = MACHINE
) -> StepChoice:
    return choose_step(task, tune, on, machine.open, PlanMemory(folder=folder), clock=machine.clock)


def test_off_takes_the_documented_default_and_runs_nothing(tmp_path: Path) -> None:
    machine = FakeMachine()
    assert choose(tmp_path, machine, "off").plan == StepPlan(precision=BF16)
    without = replace(MACHINE, bf16=False)
    assert choose(tmp_path, machine, "off", on=without).plan == StepPlan(precision=FP32)
    assert machine.trials == []
    assert list(tmp_path.iterdir()) == []


def test_quick_takes_the_fastest_names_all_and_stays_within_seconds(tmp_path: Path) -> None:
    machine = FakeMachine(
        speed=lambda plan: 400.0 if plan.precision == BF16 else 160.0 if plan.channels_last else 200.0
    )
    choice = choose(tmp_path, machine)
    assert choice.plan == StepPlan(precision=FP32)
    assert choice.source == "measured"
    for name in ("bf16 channels-last", "bf16 channels-first", "fp32 channels-last", "fp32 channels-first"):
        assert f"{name} " in choice.text
    assert "2 of the 16 images" in choice.text
    assert machine.now < 2 * QUICK_S


def test_the_second_run_remembers_and_says_when_and_how_to_forget(tmp_path: Path) -> None:
    first, second = FakeMachine(), FakeMachine()
    measured, remembered = choose(tmp_path, first), choose(tmp_path, second)
    assert second.trials == []
    assert remembered.plan == measured.plan
    assert remembered.source == "remembered"
    (file,) = tmp_path.iterdir()
    assert f"delete {file} to measure again" in remembered.text
    file.unlink()
    assert choose(tmp_path, second).source == "measured"


@pytest.mark.parametrize(
    "change",
    [
        {"model": "yolo11s"},
        {"num_classes": 4},
        {"imgsz": 320},
        {"batch": 8},
        {"boxes": 64},
        {"amp": "off"},
        {"freeze": 3},
        {"is_copied": False},
        {"uncompilable": "of a reason"},
    ],
)
def test_another_task_is_measured_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    choose(tmp_path, FakeMachine())
    machine = FakeMachine()
    assert choose(tmp_path, machine, task=replace(TASK, **change)).source == "measured"
    assert machine.trials


def test_another_machine_or_version_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(tmp_path, FakeMachine())
    assert choose(tmp_path, FakeMachine(), on=replace(MACHINE, name="Other CPU")).source == "measured"
    assert choose(tmp_path, FakeMachine(), on=replace(MACHINE, physical_cores=1)).source == "measured"
    monkeypatch.setattr(torch, "__version__", "3.0")
    assert choose(tmp_path, FakeMachine()).source == "measured"


def test_the_length_of_the_run_is_no_part_of_the_key(tmp_path: Path) -> None:
    choose(tmp_path, FakeMachine())
    assert choose(tmp_path, FakeMachine(), task=replace(TASK, steps=40_000)).source == "remembered"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"format": 1}', b"\xff\xfe"])
def test_a_torn_or_foreign_file_is_measured_anew_and_replaced(tmp_path: Path, content: bytes) -> None:
    choose(tmp_path, FakeMachine())
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for torn in (content, whole[: len(whole) // 2], whole.replace(b'"compile": false', b'"compile": 3')):
        file.write_bytes(torn)
        assert choose(tmp_path, FakeMachine()).source == "measured"
        assert choose(tmp_path, FakeMachine()).source == "remembered"


def test_a_file_of_another_key_is_not_believed(tmp_path: Path) -> None:
    memory = PlanMemory(folder=tmp_path)
    memory.keep({"a": 1}, Measurement(entries=(Measured(plan=StepPlan(precision=FP32), ms=1.0),), images=2))
    memory.file({"a": 1}).rename(memory.file({"a": 2}))
    assert memory.recall({"a": 2}) is None


def test_the_memory_gives_back_what_it_was_given(tmp_path: Path) -> None:
    memory, key = PlanMemory(folder=tmp_path), {"a": [1, "ü"]}
    plan = StepPlan(precision=BF16, channels_last=False, compile=True, graphs=True, kernels=False, threads=3)
    kept = Measurement(entries=(Measured(plan=plan, ms=1.5, compile_s=2.5), Measured(plan=plan, ms=math.inf)), images=4)
    memory.keep(key, kept)
    assert memory.recall(key) == kept
    assert StepChoice.from_json(StepChoice(plan=plan, source="measured", text="so").to_json()).plan == plan


def test_a_folder_that_cannot_be_written_costs_the_memory_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert choose(tmp_path / "file" / "steps", FakeMachine()).source == "measured"


def test_a_short_run_is_not_measured(tmp_path: Path) -> None:
    machine = FakeMachine()
    choice = choose(tmp_path, machine, task=replace(TASK, steps=2))
    assert choice.plan == StepPlan(precision=BF16)
    assert choice.source == "default"
    assert "too short to measure" in choice.text
    assert len(machine.trials) == 2
    limited = replace(TASK, limit_s=1.0)
    assert "too short to measure" in choose(tmp_path, FakeMachine(), task=limited).text


def test_amp_and_deterministic_narrow_the_candidates(tmp_path: Path) -> None:
    machine = FakeMachine()
    assert choose(tmp_path, machine, task=replace(TASK, amp="off")).plan.precision == FP32
    assert {plan.precision for plan, _ in machine.trials} == {FP32}
    machine = FakeMachine(speed=lambda plan: 1.0 if plan.precision == FP32 else 5.0)
    assert choose(tmp_path, machine, task=replace(TASK, amp="bf16")).plan.precision == BF16
    assert choose(tmp_path, machine, task=replace(TASK, deterministic=True)).plan == StepPlan(precision=BF16)
    cut = choose(tmp_path, FakeMachine(speed=lambda plan: 1.0), task=replace(TASK, is_copied=False))
    assert cut.plan.channels_last, "shards and stages lie in memory as they have to"


def test_what_the_device_cannot_do_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="amp=fp16 needs a GPU"):
        choose(tmp_path, FakeMachine(), "off", task=replace(TASK, amp="fp16"))
    gpu = replace(TASK, device=torch.device("cuda"), amp="bf16")
    with pytest.raises(UserError, match="no bfloat16"):
        candidates(gpu, replace(MACHINE, bf16=False))
    old = candidates(replace(gpu, amp="auto"), replace(MACHINE, bf16=False, fp16=True))
    assert [plan.precision.name for plan in old] == ["fp16", "fp32", "fp16", "fp32"]


def test_where_every_trial_fails_the_default_is_taken_and_not_remembered(tmp_path: Path) -> None:
    choice = choose(tmp_path, FakeMachine(speed=lambda plan: math.inf))
    assert choice.source == "default"
    assert list(tmp_path.iterdir()) == []


def test_a_measurement_that_time_cut_short_is_used_and_not_remembered(tmp_path: Path) -> None:
    machine = FakeMachine(speed=lambda plan: 4000.0 if plan.precision == BF16 else 3000.0)
    choice = choose(tmp_path, machine)
    assert choice.source == "measured"
    assert len(choice.entries) < 4
    assert list(tmp_path.iterdir()) == []


def test_threads_are_left_alone_where_somebody_has_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, plan = replace(TASK, ranks=1), StepPlan(precision=FP32)
    eight = replace(MACHINE, physical_cores=4, logical_cores=8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [p.threads for p in with_threads(plan, alone, eight)] == [3, 0, 8], "0 is as torch has it"
    assert with_threads(plan, TASK, eight) == (plan,), "several ranks share the cores"
    assert with_threads(plan, replace(alone, deterministic=True), eight) == (plan,)
    assert with_threads(plan, replace(alone, device=torch.device("cuda")), eight) == (plan,)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert with_threads(plan, alone, eight) == (plan,)


def test_threads_are_timed_on_the_best_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    four = replace(MACHINE, physical_cores=4, logical_cores=8)

    def speed(plan: StepPlan) -> float:
        return usual(plan) * {0: 1.0, 3: 1.2, 8: 0.7}[plan.threads]

    choice = choose(tmp_path, FakeMachine(speed=speed), task=replace(TASK, ranks=1), on=four)
    assert choice.plan == StepPlan(precision=BF16, threads=8)
    assert "8 threads" in choice.text


@pytest.mark.parametrize("disturbed", [1.25, 2.0])
def test_a_program_that_comes_when_threads_are_timed_does_not_choose_few(
    disturbed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It slows the step of all threads, of which it was known what it takes; the one of few it leaves its core."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    seen: list[int] = []

    def speed(plan: StepPlan) -> float:
        seen.append(plan.threads)
        return usual(plan) * (1.15 if plan.threads == 1 else disturbed if 1 in seen else 1.0)

    choice = choose(tmp_path, FakeMachine(speed=speed), task=replace(TASK, ranks=1))
    assert 1 in seen
    assert choice.plan == StepPlan(precision=BF16)


def test_full_times_the_whole_batch_and_says_when_compilation_pays(tmp_path: Path) -> None:
    machine = FakeMachine()
    choice = choose(tmp_path, machine, "full")
    assert {images for _, images in machine.trials} == {2, 16}, "two images tell how long the rest will take"
    assert choice.plan == StepPlan(precision=BF16, compile=True)
    assert "Compiling costs 90 s and saves 32.0 ms a step: pays back after 2,813 of 50,000 steps" in choice.text


def test_a_remembered_compilation_is_counted_anew_for_each_run(tmp_path: Path) -> None:
    choose(tmp_path, FakeMachine(), "full")
    machine = FakeMachine()
    short = choose(tmp_path, machine, "full", task=replace(TASK, steps=2_000))
    assert not short.plan.compile
    assert "it would pay back after 2,813 steps, and this run has 2,000" in short.text
    limited = choose(tmp_path, machine, "full", task=replace(TASK, limit_s=60.0))
    assert not limited.plan.compile
    assert "this run has 468" in limited.text, "60 s of 128 ms"
    assert choose(tmp_path, machine, "quick").plan.compile, "quick uses what full has found"
    assert machine.trials == []


def test_compilation_is_not_tried_where_it_cannot_pay_and_tried_later_where_it_can(tmp_path: Path) -> None:
    machine = FakeMachine()
    short = choose(tmp_path, machine, "full", task=replace(TASK, steps=200))
    assert not any(plan.compile for plan, _ in machine.trials)
    assert "Compilation was not tried: a run of 200 steps is too short to pay it back" in short.text
    machine = FakeMachine()
    assert choose(tmp_path, machine, "full").plan.compile
    assert {plan for plan, _ in machine.trials} == {StepPlan(precision=BF16), StepPlan(precision=BF16, compile=True)}


def test_compilation_that_is_impossible_fails_or_saves_nothing(tmp_path: Path) -> None:
    machine = FakeMachine()
    out = choose(tmp_path, machine, "full", task=replace(TASK, uncompilable="multi_scale changes the image size"))
    assert not any(plan.compile for plan, _ in machine.trials)
    assert "multi_scale changes the image size" in out.text

    def failing(plan: StepPlan) -> float:
        return math.inf if plan.compile else usual(plan)

    failed = choose(tmp_path, FakeMachine(speed=failing), "full")
    assert not failed.plan.compile
    assert "Compilation failed" in failed.text
    again = FakeMachine(speed=failing)
    assert "Compilation failed" in choose(tmp_path, again, "full").text
    assert again.trials == [], "a failure is remembered too"
    base, slower = StepPlan(precision=FP32), StepPlan(precision=FP32, compile=True)
    plan, sentences = settle([Measured(plan=base, ms=10.0), Measured(plan=slower, ms=11.0, compile_s=5.0)], TASK)
    assert plan == base
    assert sentences == ["Compiling costs 5 s and saves nothing"]


GPU = Machine(name="GPU", physical_cores=8, logical_cores=16, bf16=True, fp16=True)
ON_GPU = replace(TASK, device=torch.device("cuda"), uncompilable="of a reason")


@pytest.mark.parametrize("tune", ["quick", "full"])
def test_graphs_are_timed_on_gpus_alone(tmp_path: Path, tune: str) -> None:
    assert choose(tmp_path, FakeMachine(), tune, task=ON_GPU, on=GPU).plan == StepPlan(precision=BF16, graphs=True)
    assert not choose(tmp_path, FakeMachine(), tune, task=replace(TASK, uncompilable="of a reason")).plan.graphs
    for hosts_part in ({"is_copied": False}, {"is_recordable": False}):
        shared = choose(tmp_path, FakeMachine(), tune, task=replace(ON_GPU, **hosts_part), on=GPU)
        assert not shared.plan.graphs
        assert "graphs" not in shared.text, "the log says what happens"


@pytest.mark.parametrize("tune", ["off", "quick", "full"])
def test_deterministic_steps_are_graphs_where_they_can_be(tmp_path: Path, tune: str) -> None:
    """Nothing is measured, since a measurement may end either way; `off` is how someone does without graphs."""
    machine, task = FakeMachine(), replace(ON_GPU, deterministic=True)
    choice = choose(tmp_path, machine, tune, task=task, on=GPU)
    assert choice.plan == StepPlan(precision=BF16, graphs=tune != "off")
    assert machine.trials == []
    assert ("graphs" in choice.text) == (tune != "off")
    for hosts_part in ({"is_copied": False}, {"is_recordable": False}):
        other = choose(tmp_path, machine, tune, task=replace(task, **hosts_part), on=GPU)
        assert other.plan == StepPlan(precision=BF16)
    assert machine.trials == []


WITH_KERNELS = replace(ON_GPU, has_kernels=True)


def host_bound(plan: StepPlan) -> float:
    """Milliseconds for one image where the host starts more kernels of ours than it would of torch's."""
    return math.inf if plan.graphs else usual(plan) * (1.0 if plan.kernels else 0.7)


@pytest.mark.parametrize("tune", ["quick", "full"])
@pytest.mark.parametrize("is_copied", [True, False])
def test_where_there_are_no_graphs_a_step_without_kernels_is_tried(tmp_path: Path, tune: str, is_copied: bool) -> None:
    """Graphs fail, or shards and stages are not recorded: what is faster is taken, remembered, and named."""
    task, without = replace(WITH_KERNELS, is_copied=is_copied), StepPlan(precision=BF16, kernels=False)
    choice = choose(tmp_path, FakeMachine(speed=host_bound), tune, task=task, on=GPU)
    assert choice.plan == without
    assert "bf16 channels-last without kernels 89.6 ms" in choice.text
    assert "bf16 channels-last 128 ms" in choice.text
    machine = FakeMachine(speed=host_bound)
    assert choose(tmp_path, machine, tune, task=task, on=GPU).plan == without
    assert machine.trials == []
    slower = FakeMachine(speed=lambda plan: math.inf if plan.graphs else 1.0 if plan.kernels else 1.01)
    other = choose(tmp_path / "other", slower, tune, task=task, on=GPU)
    assert other.plan == StepPlan(precision=BF16), "of equals, kernels"
    assert without in {plan for plan, _ in slower.trials}


@pytest.mark.parametrize(
    ("task", "speed"),
    [
        (WITH_KERNELS, usual),  # a graph, which does not wait for the host
        (ON_GPU, host_bound),  # no kernels to leave out
        (replace(WITH_KERNELS, steps=2000), host_bound),  # too short for what libraries need at first
        (replace(WITH_KERNELS, limit_s=300.0), host_bound),
        (replace(WITH_KERNELS, device=torch.device("cpu")), host_bound),
    ],
)
def test_kernels_are_not_left_out_for_nothing(
    tmp_path: Path, task: StepTask, speed: Callable[[StepPlan], float]
) -> None:
    machine = FakeMachine(speed=speed)
    assert choose(tmp_path, machine, task=task, on=GPU).plan.kernels
    assert all(plan.kernels for plan, _ in machine.trials)


def test_whether_there_are_kernels_is_part_of_the_key(tmp_path: Path) -> None:
    choose(tmp_path, FakeMachine(), task=WITH_KERNELS, on=GPU)
    assert choose(tmp_path, FakeMachine(), task=ON_GPU, on=GPU).source == "measured"
    assert choose(tmp_path, FakeMachine(), task=WITH_KERNELS, on=GPU).source == "remembered"


def test_a_gpu_takes_the_whole_batch_and_its_first_step_costs_nothing_of_the_budget(tmp_path: Path) -> None:
    slow = FakeMachine()
    first = [10 * QUICK_S]

    def seconds(plan: StepPlan) -> float:
        slow.now += first.pop() if first else 0.0
        return usual(plan)

    slow.speed = seconds
    choice = choose(tmp_path, slow, "quick", task=ON_GPU, on=GPU)
    assert {images for _, images in slow.trials} == {ON_GPU.batch}
    assert {plan for plan, _ in slow.trials} == {StepPlan(precision=BF16), StepPlan(precision=BF16, graphs=True)}
    assert choice.plan.graphs


def test_no_step_is_measured_where_nothing_is_left_to_choose(tmp_path: Path) -> None:
    machine = FakeMachine()
    choice = choose(tmp_path, machine, task=replace(TASK, amp="off", is_copied=False))
    assert choice.plan == StepPlan(precision=FP32)
    assert machine.trials == []


def test_processors_and_quotas_are_read(tmp_path: Path) -> None:
    x86 = "processor\t: 0\nmodel name\t: A B @ 2 GHz\nflags\t\t: fpu avx512_bf16\n\nprocessor\t: 1\n"
    assert processor_of(x86) == ("A B @ 2 GHz", frozenset({"fpu", "avx512_bf16"}))
    arm = "processor\t: 0\nFeatures\t: fp bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"
    assert processor_of(arm) == ("0x41 0xd4f", frozenset({"fp", "bf16"}))
    assert processor_of("")[0]
    file = tmp_path / "cpu.max"
    assert quota_of(file) > 1000
    for text, cores in (("max 100000\n", 1 << 16), ("150000 100000\n", 2), ("1000 100000", 1), ("torn", 1 << 16)):
        file.write_text(text)
        assert quota_of(file) == cores


def test_the_file_names_its_key_for_a_person(tmp_path: Path) -> None:
    choose(tmp_path, FakeMachine())
    (file,) = tmp_path.iterdir()
    key = json.loads(file.read_text())["key"]
    assert (key["machine"], key["model"], key["imgsz"], key["batch"]) == ("Test CPU", "yolo11n", 640, 16)
