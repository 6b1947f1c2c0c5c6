from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paceline.drawing.curves import confidence_curves, pr_curves, run_curves
from paceline.drawing.palette import HUES, class_colour

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Read = Callable[[Path], np.ndarray]


def epoch_record(epoch: int, ap: float | None = 0.4) -> dict[str, Any]:
    evaluation = None if ap is None else {"ap": ap, "ap50": ap * 1.5, "precision": ap, "recall": ap}
    return {
        "kind": "epoch", "epoch": epoch, "learning_rate": 0.01 / epoch, "train_images_per_s": 90.0 + epoch,
        "wall_s": 10.0, "loss": {"box": 2 / epoch, "cls": 3 / epoch, "dfl": None}, "evaluation": evaluation,
        "spans_s": {"forward": 3.0, "backward": 5.0, "data": 1.0, "device_wait": 0.01, "other": 1.0},
    }  # fmt: skip


def share_of(picture: np.ndarray, hue: str) -> float:
    colour = [int(hue[k : k + 2], 16) for k in (1, 3, 5)]
    return float((picture == colour).all(axis=2).mean())


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    """Pixels of nearly this colour; thin lines blend with the paper."""
    return int((np.abs(picture.astype(int) - colour).max(axis=2) < 12).sum())


@pytest.mark.parametrize("epochs", [0, 1, 5, 80])
def test_runs_of_every_length(epochs: int, tmp_path: Path, pixels: Read) -> None:
    run_curves(tmp_path / "run.png", [epoch_record(epoch) for epoch in range(1, epochs + 1)])
    picture = pixels(tmp_path / "run.png")
    assert picture.shape == (988, 1690, 3)
    assert (share_of(picture, HUES[1]) > 0.005) == (epochs > 0)


def test_a_run_without_evaluations_or_spans(tmp_path: Path, pixels: Read) -> None:
    records = [epoch_record(epoch, ap=None) | {"spans_s": {}} for epoch in (1, 2)]
    run_curves(tmp_path / "run.png", records)
    picture = pixels(tmp_path / "run.png")
    assert (picture != 255).any()
    assert share_of(picture, HUES[5]) == 0


def test_no_epoch_is_the_best_while_nothing_was_found(tmp_path: Path, pixels: Read) -> None:
    shares = []
    for name, ap in (("nothing", 0.0), ("little", 1e-4)):
        run_curves(tmp_path / f"{name}.png", [epoch_record(epoch, ap) for epoch in (1, 2)])
        shares.append(share_of(pixels(tmp_path / f"{name}.png"), HUES[1]))
    assert shares[0] < shares[1], "a star, in its panel and in the legend"


def test_seconds_take_the_share_of_the_page_that_they_took_of_the_run(tmp_path: Path, pixels: Read) -> None:
    run_curves(tmp_path / "run.png", [epoch_record(epoch) for epoch in range(1, 71)])
    picture = pixels(tmp_path / "run.png")[500:, 700:]
    data, forward, backward = (share_of(picture, HUES[k]) for k in range(3))
    assert forward / data == pytest.approx(3, rel=0.15)
    assert backward / data == pytest.approx(5, rel=0.15)


def test_of_an_epoch_that_was_run_twice_the_last_record_counts(tmp_path: Path) -> None:
    clean = [epoch_record(epoch) for epoch in (1, 2, 3)]
    run_curves(tmp_path / "clean.png", clean)
    run_curves(tmp_path / "resumed.png", [clean[0], epoch_record(2, ap=0.9), clean[1], clean[2]])
    run_curves(tmp_path / "other.png", [clean[0], epoch_record(2, ap=0.9), clean[2]])
    assert (tmp_path / "resumed.png").read_bytes() == (tmp_path / "clean.png").read_bytes()
    assert (tmp_path / "other.png").read_bytes() != (tmp_path / "clean.png").read_bytes()


def curves_of(num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    recall = np.linspace(0, 1, 101)
    ap50 = np.linspace(0.3, 0.9, num_classes)
    return recall, 1 - recall[None] ** (ap50 / (1 - ap50))[:, None], ap50


@pytest.mark.parametrize("num_classes", [1, 3, 40, 80])
def test_precision_over_recall(num_classes: int, tmp_path: Path, pixels: Read) -> None:
    recall, precision, ap50 = curves_of(num_classes)
    before = precision.copy(), ap50.copy()
    names = [f"a rather long name of class {k}" for k in range(num_classes)]
    pr_curves(tmp_path / "pr.png", recall, precision, ap50, names)
    picture = pixels(tmp_path / "pr.png")
    assert near(picture, class_colour(0)) > 100  # the weakest, or one of few
    assert (near(picture, class_colour(num_classes - 1)) > 100) == (num_classes <= 12)
    assert np.array_equal(precision, before[0])
    assert np.array_equal(ap50, before[1])


def test_classes_without_truth_are_left_out(tmp_path: Path) -> None:
    recall, precision, ap50 = curves_of(3)
    ap50[1], precision[1] = -1, -1
    pr_curves(tmp_path / "minus.png", recall, precision, ap50, list("abc"))
    ap50[1], precision[1] = np.nan, np.nan
    pr_curves(tmp_path / "nan.png", recall, precision, ap50, list("abc"))
    assert (tmp_path / "minus.png").read_bytes() == (tmp_path / "nan.png").read_bytes()


def test_no_truth_at_all(tmp_path: Path, pixels: Read) -> None:
    pr_curves(tmp_path / "pr.png", np.linspace(0, 1, 101), np.full((2, 101), -1), [-1, -1], ["a", "b"])
    confidence_curves(tmp_path / "f1.png", [0, 1], np.full((2, 2), np.nan), ["a", "b"], "F1", "F1", (np.nan, np.nan))
    confidence_curves(tmp_path / "none.png", [0, 1], np.zeros((0, 2)), [], "F1", "F1")
    for name in ("pr", "f1", "none"):
        assert (pixels(tmp_path / f"{name}.png") != 255).any()


def test_the_best_threshold_is_marked_where_it_is(tmp_path: Path, pixels: Read) -> None:
    confidence = np.linspace(0, 1, 1000)
    values = np.sin(np.pi * confidence)[None] * np.array([[0.5], [0.9]])
    confidence_curves(tmp_path / "plain.png", confidence, values, ["a", "b"], "F1", "F1")
    columns = []
    for x in (0.25, 0.5):
        confidence_curves(tmp_path / "best.png", confidence, values, ["a", "b"], "F1", "F1", (x, 0.3))
        changed = (pixels(tmp_path / "best.png") != pixels(tmp_path / "plain.png")).any(axis=2)
        columns.append(int(np.flatnonzero(changed[-140:-80].any(axis=0)).mean()))
    assert columns[1] - columns[0] > 150


def test_threads_draw_alike(tmp_path: Path) -> None:
    def draw(number: int) -> bytes:
        recall, precision, ap50 = curves_of(3)
        path = tmp_path / f"{number}.png"
        pr_curves(path, recall, precision, ap50, ["a", "b", "猫"])
        return path.read_bytes()

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(draw, range(1, 5))) == {draw(0)}
