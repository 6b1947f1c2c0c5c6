"""Words of a command line: every way to write an option means the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from paceline.cli.argv import sort_words
from paceline.errors import UserError
from paceline.options import DataPlotOptions, PredictOptions, TrainOptions

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "words",
    [
        ["imgsz=320", "close_mosaic=3", "cos_lr=True"],
        ["--imgsz", "320", "--close-mosaic", "3", "--cos-lr"],
        ["--imgsz=320", "--close_mosaic=3", "--cos_lr=1"],
        ["close-mosaic=3", "--imgsz", "320", "--cos-lr", "true"],
        ["cos_lr", "imgsz=640", "imgsz=320", "--close_mosaic", "3"],
    ],
)
def test_ways_to_write_options_agree(words: list[str]) -> None:
    expected = TrainOptions.from_flat({"imgsz": 320, "close_mosaic": 3, "cos_lr": True})
    assert TrainOptions.from_flat(sort_words(TrainOptions, words).options) == expected


def test_flags_take_the_next_word_only_if_it_is_a_truth_value() -> None:
    words = sort_words(PredictOptions, ["--save-txt", "a.jpg", "--save", "false", "b.jpg", "--no-show-conf"])
    options = PredictOptions.from_flat(words.options).prediction
    assert options.source == ("a.jpg", "b.jpg")
    assert (options.save_txt, options.save, options.show_conf) == (True, False, False)


def test_lists_end_where_an_option_or_an_image_begins() -> None:
    options = sort_words(PredictOptions, ["--classes", "0", "2", "a.jpg", "--source", "b.jpg", "conf=0.5"]).options
    assert options == {"classes": ["0", "2"], "source": ["a.jpg", "b.jpg"], "conf": "0.5"}
    assert sort_words(PredictOptions, ["a.jpg", "source=b.jpg"]).options["source"] == ["a.jpg", "b.jpg"]
    assert sort_words(PredictOptions, ["a.jpg", "classes=0,2", "b.jpg"]).options["source"] == ["a.jpg", "b.jpg"]


def test_negative_numbers_and_equal_signs_are_values() -> None:
    options = sort_words(TrainOptions, ["--save-period", "-1", "--data", "lr=1/data.yaml", "name=a=b"]).options
    assert options == {"save_period": "-1", "data": "lr=1/data.yaml", "name": "a=b"}


def test_words_with_a_slash_before_the_equal_sign_are_images() -> None:
    assert sort_words(PredictOptions, ["runs/lr=0.1/a.jpg"]).options == {"source": ["runs/lr=0.1/a.jpg"]}


def test_resume_may_stand_alone() -> None:
    for words in (["--resume"], ["resume"], ["--resume", "--imgsz=320"]):
        assert sort_words(TrainOptions, words).options["resume"] == "true"
    assert sort_words(TrainOptions, ["--resume", "runs/train"]).options == {"resume": "runs/train"}


def test_a_file_named_like_a_flag_is_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sort_words(PredictOptions, ["save_txt"]).options == {"save_txt": "true"}
    (tmp_path / "save_txt").touch()
    assert sort_words(PredictOptions, ["save_txt"]).options == {"source": ["save_txt"]}


def test_positions_are_filled_in_order() -> None:
    assert sort_words(DataPlotOptions, ["set.yaml", "plot.png"]).options == {"data": "set.yaml", "file": "plot.png"}
    assert sort_words(DataPlotOptions, ["data=set.yaml", "plot.png"]).options == {
        "data": "set.yaml",
        "file": "plot.png",
    }
    with pytest.raises(UserError, match=r"other\.png"):
        sort_words(DataPlotOptions, ["set.yaml", "plot.png", "other.png"])


def test_help_and_config_are_no_options() -> None:
    words = sort_words(TrainOptions, ["imgsz=320", "--config", "a.yaml", "-h"])
    assert (words.options, words.config, words.help) == ({"imgsz": "320"}, "a.yaml", True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--imgz", "3"], "did you mean imgsz"),
        (["imgz=3"], "did you mean imgsz"),
        (["--imgsz"], "needs a value"),
        (["--imgsz", "--epochs=3"], "needs a value"),
        (["--classes"], "needs a value"),
        (["coco.yaml"], "name=value"),
        (["-x"], "name=value"),
    ],
)
def test_mistakes(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        sort_words(TrainOptions, words)
