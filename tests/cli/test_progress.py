from __future__ import annotations

import dataclasses
import io
import logging
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from paceline.cli.progress import ProgressCallback, ProgressLogHandler
from paceline.records import (
    ClassRecord,
    EndRecord,
    EpochRecord,
    EvaluationRecord,
    LossRecord,
    RunRecord,
    StepRecord,
)

SHOW_CURSOR = "\x1b[?25h"
LOSS = LossRecord(box=1.25, cls=2.5, dfl=1.125)


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def start_record(epochs: int = 3) -> RunRecord:
    return RunRecord(
        folder=Path("runs/train"), model="yolo11n", data="blood", class_names=("a", "[b]"), epochs=epochs,
        num_train_images=1292, num_val_images=72, num_parameters=2590230, device="cpu", precision="bf16",
        optimizer="AdamW",
    )  # fmt: skip


def evaluation(ap: float, classes: int = 2) -> EvaluationRecord:
    per_class = tuple(
        ClassRecord(name=f"[b]{k}[/b]", num_boxes=10, num_images=5, ap=ap, ap50=-1, precision=0.5, recall=0.25, f1=0.3)
        for k in range(classes)
    )
    return EvaluationRecord(
        ap=ap, ap50=0.5, ap75=ap, ap_small=-1, ap_medium=ap, ap_large=ap, ar1=0, ar10=0, ar100=0, ar_small=0,
        ar_medium=0, ar_large=0, precision=0.75, recall=0.625, f1=0.6, threshold=0.4, num_images=72, num_boxes=1967,
        per_class=per_class,
    )  # fmt: skip


def step(epoch: int, number: int, loss: LossRecord | None = LOSS) -> StepRecord:
    return StepRecord(epoch=epoch, step=number, steps_in_epoch=100, images=16, seconds=1.0, loss=loss)


def epoch_end(epoch: int, ap: float | None, best_ap: float, epochs: int = 3) -> EpochRecord:
    return EpochRecord(
        epoch=epoch, epochs=epochs, step=100 * epoch, images=1600, wall_s=120.0, elapsed_s=120.0 * epoch,
        train_images_per_s=16.0, learning_rate=0.01, loss=LOSS, evaluation=None if ap is None else evaluation(ap),
        best_ap=best_ap,
    )  # fmt: skip


def end(folder: Path = Path("runs/train"), reason: str = "finished", best: EvaluationRecord | None = None) -> EndRecord:
    return EndRecord(folder=folder, reason=reason, epochs=3, best_epoch=2 if best else 0, best=best, wall_s=361.0)


def plain() -> tuple[ProgressCallback, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return ProgressCallback(Console(file=stream, width=80, force_terminal=False), clock=clock), stream, clock


def live(width: int = 120) -> tuple[ProgressCallback, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, width=width, force_terminal=True, force_jupyter=False, legacy_windows=False,
                      _environ={"TERM": "xterm-256color"})  # fmt: skip
    return ProgressCallback(console, clock=clock), stream, clock


def test_plain_lines_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no run folder of that name
    progress, stream, clock = plain()
    progress.on_start(start_record())
    for epoch, (ap, best) in enumerate([(0.25, 0.25), (0.5, 0.5), (0.125, 0.5)], start=1):
        for number in range(1, 11):
            clock.now += 1.0
            progress.on_step(step(epoch, number))
        progress.on_evaluation(epoch, evaluation(ap))
        progress.on_epoch(epoch_end(epoch, ap, best))
    progress.on_end(end(best=evaluation(0.5)))
    assert stream.getvalue().splitlines() == [
        "yolo11n on blood",
        "2 classes, 1,292 training and 72 validation images, 2,590,230 parameters",
        "3 epochs on cpu, bf16, AdamW",
        "writing to runs/train",
        "",
        "epoch 1/3: box 1.250, cls 2.500, dfl 1.125; 16.0 images/s; "
        "P 0.750, R 0.625, AP50 0.500, AP 0.250 (best); 2:00, run left 4:00",
        "epoch 2/3: box 1.250, cls 2.500, dfl 1.125; 16.0 images/s; "
        "P 0.750, R 0.625, AP50 0.500, AP 0.500 (best); 2:00, run left 2:00",
        "epoch 3/3: box 1.250, cls 2.500, dfl 1.125; 16.0 images/s; P 0.750, R 0.625, AP50 0.500, AP 0.125; 2:00",
        "",
        "finished: 3 epochs in 6:01, the best was epoch 2",
        "",
        "class      images    boxes       P       R    AP50      AP",
        "all            72    1,967   0.750   0.625   0.500   0.500",
        "[b]0[/b]        5       10   0.500   0.250       -   0.500",
        "[b]1[/b]        5       10   0.500   0.250       -   0.500",
        "",
        "folder    runs/train",
        "weights   runs/train/weights/best.safetensors",
    ]


def test_long_epochs_say_a_line_every_half_minute() -> None:
    progress, stream, clock = plain()
    progress.on_start(start_record())
    for number in range(1, 101):
        clock.now += 1.0
        progress.on_step(step(1, number, LOSS if number < 40 else None))
    lines = stream.getvalue().splitlines()[5:]
    assert lines == [
        "epoch 1/3, step 30/100: box 1.250, cls 2.500, dfl 1.125; 16.0 images/s; epoch left 1:10, run left 4:30",
        "epoch 1/3, step 60/100: box 1.250, cls 2.500, dfl 1.125; 16.0 images/s; epoch left 40 s, run left 4:00",
        "epoch 1/3, step 90/100: box 1.250, cls 2.500, dfl 1.125; 16.0 images/s; epoch left 10 s, run left 3:30",
    ]


def test_the_time_left_counts_evaluations_once_one_was_seen() -> None:
    progress, stream, clock = plain()
    progress.on_start(start_record())
    progress.on_epoch(epoch_end(1, 0.25, 0.25))
    for number in range(1, 41):
        clock.now += 1.0
        progress.on_step(step(2, number, None))
    assert stream.getvalue().splitlines()[-1] == (
        "epoch 2/3, step 30/100: losses not read yet; 16.0 images/s; epoch left 1:10, run left 3:30"
    )


def test_an_epoch_without_evaluation_says_none_and_a_tie_is_not_a_new_best() -> None:
    progress, stream, _ = plain()
    progress.on_epoch(epoch_end(1, 0.125, 0.125))
    progress.on_epoch(epoch_end(2, None, 0.125))
    progress.on_epoch(epoch_end(3, 0.125, 0.125))
    first, second, third = stream.getvalue().splitlines()
    assert "AP 0.125 (best)" in first
    assert "AP" not in second
    assert "AP 0.125;" in third


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("nothing", [0.0, 0.0004, -1.0])
def test_no_epoch_is_the_best_while_nothing_was_found(terminal: bool, nothing: float) -> None:
    """-1 is an AP that COCO leaves undefined: no boxes to find."""
    progress, stream, _ = live() if terminal else plain()
    progress.on_start(start_record())
    progress.on_epoch(epoch_end(1, nothing, nothing))
    progress.on_epoch(epoch_end(2, None, nothing))
    progress.on_evaluation(2, evaluation(nothing))
    progress.on_epoch(epoch_end(3, None, nothing))
    progress.on_end(end(best=evaluation(nothing)))
    progress.close()
    assert "best" not in stream.getvalue().replace("best.safetensors", "")
    assert "★" not in stream.getvalue()
    assert "finished: 3 epochs in 6:01, no epoch has an AP above 0.000 yet" in stream.getvalue()


def test_the_first_epoch_that_finds_anything_is_the_best() -> None:
    progress, stream, _ = plain()
    progress.on_epoch(epoch_end(1, 0.0, 0.0))
    progress.on_epoch(epoch_end(2, 0.001, 0.001))
    progress.on_epoch(epoch_end(3, 0.0, 0.001))
    assert ["(best)" in line for line in stream.getvalue().splitlines()] == [False, True, False]


def test_the_end_says_where_to_look_and_how_to_go_on(tmp_path: Path) -> None:
    progress, stream, _ = plain()
    (tmp_path / "pictures").mkdir()
    progress.on_end(end(tmp_path, "preempted"))
    assert stream.getvalue().splitlines() == [
        "",
        "preempted: 3 epochs in 6:01",
        "",
        f"folder    {tmp_path}",
        f"weights   {tmp_path}/weights/last.safetensors",
        f"pictures  {tmp_path}/pictures",
        f"go on     paceline train --resume {tmp_path}",
    ]


def test_a_run_without_a_finished_epoch_names_no_files_that_are_not_there(tmp_path: Path) -> None:
    progress, stream, _ = plain()
    progress.on_end(dataclasses.replace(end(tmp_path, "preempted"), epochs=0))
    assert stream.getvalue().splitlines() == [
        "",
        "preempted: 0 epochs in 6:01",
        "",
        f"folder    {tmp_path}",
        "no epoch was finished, so nothing is kept to go on from; start the run again",
    ]


@pytest.mark.parametrize(("classes", "rows"), [(0, 1), (1, 1), (40, 41), (41, 1)])
def test_up_to_forty_classes_have_a_row(classes: int, rows: int) -> None:
    progress, stream, _ = plain()
    progress.on_end(end(best=evaluation(0.5, classes)))
    table = stream.getvalue().split("AP50      AP\n")[1].split("\n\n")[0]
    assert len(table.splitlines()) == rows


@pytest.mark.parametrize(("width", "columns"), [(120, 12), (80, 10), (78, 8), (60, 8), (59, 5), (40, 5)])
def test_the_table_fits_the_terminal(width: int, columns: int) -> None:
    progress, stream, _ = live(width)
    progress.on_epoch(epoch_end(1, 0.25, 0.25))
    header, row = Console(width=200).render_str(_without_codes(stream.getvalue())).plain.splitlines()
    assert len(header.split()) == columns
    losses = ["1.250", "2.500", "1.125"] if "box" in header else []
    assert row.split()[: 1 + len(losses)] == ["1/3", *losses]
    assert "★" in row
    assert len(row.rstrip()) <= len(header) < width


@pytest.mark.parametrize("width", [120, 80, 60])
def test_figures_of_classes_with_long_names_fit_the_terminal(width: int) -> None:
    progress, stream, _ = live(width)
    best = evaluation(0.5)
    long = dataclasses.replace(best.per_class[0], name="a very long name of a kind of objects")
    progress.on_end(end(best=dataclasses.replace(best, per_class=(long, *best.per_class[1:]))))
    table = _without_codes(stream.getvalue()).split("class ")[1].split("\n\n")[0].splitlines()
    assert len(table) == 4
    assert max(len(line) for line in table[1:]) < width


def test_the_bar_is_drawn_at_most_eight_times_a_second_and_costs_little() -> None:
    progress, stream, clock = live()
    progress.on_start(start_record())
    stream.truncate(0)
    for number in range(1, 100):
        clock.now += 0.01
        progress.on_step(step(1, number))
    assert 6 <= stream.getvalue().count("images/s") <= 8


def test_a_slow_terminal_is_drawn_to_less_often() -> None:
    stream, clock = io.StringIO(), Clock()

    class SlowConsole(Console):
        def print(self, *values: object, **options: object) -> None:
            clock.now += 0.005
            super().print(*values, **options)  # type: ignore[arg-type]

    progress = ProgressCallback(SlowConsole(file=stream, width=120, force_terminal=True), clock=clock)
    progress.on_start(start_record())
    stream.truncate(0)
    start = clock.now
    for number in range(1, 100):
        clock.now += 0.1
        progress.on_step(step(1, number))
    assert 1 <= stream.getvalue().count("images/s") <= (clock.now - start) / 2.5 + 1


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_step_costs_less_than_a_fifth_of_a_millisecond(is_terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=is_terminal)
    records = [step(1, number) for number in range(1, 100)]
    with ProgressCallback(console) as progress:
        progress.on_start(start_record())
        begin = time.process_time()
        for _ in range(50):
            for record in records:
                progress.on_step(record)
        cost_s = (time.process_time() - begin) / (50 * len(records))
    assert cost_s < 0.2e-3


def test_messages_stand_above_the_bar() -> None:
    progress, stream, clock = live()
    progress.on_start(start_record())
    clock.now += 1
    progress.on_step(step(1, 1))
    log = logging.Logger("test")
    log.addHandler(ProgressLogHandler(progress))
    log.info("an image was left out: %s", "[red]x.jpg[/red]")
    text = _without_codes(stream.getvalue())
    assert text.index("an image was left out: [red]x.jpg[/red]") < text.rindex("1/100")


def test_an_exception_leaves_the_terminal_whole() -> None:
    progress, stream, _ = live()

    def fail() -> None:
        with progress:
            progress.on_start(start_record())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    progress.close()
    assert stream.getvalue().count(SHOW_CURSOR) == 1


def test_losses_that_were_not_read_keep_their_last_values() -> None:
    progress, stream, clock = live()
    progress.on_start(start_record())
    progress.on_step(step(1, 1))
    clock.now += 1
    stream.truncate(0)
    progress.on_step(step(1, 2, None))
    assert "box 1.250" in _without_codes(stream.getvalue())


@pytest.mark.parametrize("width", [120, 60, 30])
def test_a_terminal_without_unicode_gets_ascii(width: int) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    progress = ProgressCallback(Console(file=stream, width=width, force_terminal=True))
    progress.on_start(start_record())
    progress.on_step(step(1, 1))
    progress.message("Straße")
    progress.on_epoch(epoch_end(1, 0.25, 0.25))
    progress.on_end(end(best=evaluation(0.5)))
    stream.flush()
    assert b"Stra?e" in raw.getvalue()


def _without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("terminal", [False, True])
def test_figures_that_come_late_get_a_line_of_their_own(terminal: bool) -> None:
    progress, stream, _ = live() if terminal else plain()
    progress.on_start(start_record())
    progress.on_epoch(epoch_end(1, None, -1.0))
    progress.on_evaluation(1, evaluation(0.25))
    progress.on_epoch(epoch_end(2, None, 0.25))
    progress.on_evaluation(2, evaluation(0.125))
    progress.on_evaluation(3, evaluation(0.625))
    progress.on_epoch(epoch_end(3, 0.625, 0.625))
    progress.close()
    lines = [line for line in stream.getvalue().splitlines() if "1.250" in line or "evaluated" in line]
    assert ["evaluated" in line for line in lines] == [False, True, False, True, False]
    assert ["0.500" in line for line in lines] == [False, True, False, True, True], "AP50"
    for number, ap in ((1, "0.250"), (3, "0.125")):
        assert ap in lines[number]
    assert [("best" in line or "★" in line) for line in lines] == [False, True, False, False, True]


def test_figures_that_nobody_waited_for_are_shown_at_the_end() -> None:
    progress, stream, _ = plain()
    progress.on_evaluation(2, evaluation(0.25))
    progress.on_end(end())
    assert "epoch 2 evaluated: P 0.750, R 0.625, AP50 0.500, AP 0.250 (best)" in stream.getvalue().splitlines()
