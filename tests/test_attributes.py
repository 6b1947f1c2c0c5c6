"""The attributes of the reference's objects: none of them is there, and each has a sentence."""

from __future__ import annotations

import importlib

import pytest

from paceline.attributes import INSTEAD, missing

HOMES = {
    "YOLO": "paceline.yolo",
    "Results": "paceline.results",
    "Boxes": "paceline.results",
    "Evaluation": "paceline.evaluation.evaluator",
    "TrainResult": "paceline.commands.train",
}


@pytest.mark.parametrize("kind", INSTEAD)
def test_what_is_answered_is_not_there(kind: str) -> None:
    holder = getattr(importlib.import_module(HOMES[kind]), kind)
    there = set(dir(holder)) | set(getattr(holder, "__dataclass_fields__", {}))
    assert set(INSTEAD[kind]) & there == set()


@pytest.mark.parametrize("kind", INSTEAD)
def test_each_class_gives_its_sentences(kind: str) -> None:
    holder = getattr(importlib.import_module(HOMES[kind]), kind)
    empty = object.__new__(holder)
    for name, sentence in INSTEAD[kind].items():
        with pytest.raises(AttributeError) as caught:
            getattr(empty, name)
        assert str(caught.value) == f"{kind!r} object has no attribute {name!r}: {sentence}."


def test_other_names_are_errors_like_any_other() -> None:
    error = missing(3, "nothing")
    assert str(error) == "'int' object has no attribute 'nothing'"
    assert (error.name, error.obj) == ("nothing", 3)
