"""The space: what it accepts, what it says of anything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from paceline.errors import UserError
from paceline.option_values import typed
from paceline.options import TrainOptions, option_fields
from paceline.tuning.space import Choices, Range, SearchSpace, default_space_text, read_space

if TYPE_CHECKING:
    from pathlib import Path

KNOWN = option_fields(TrainOptions)
TYPES = {name: entry.annotation if isinstance(entry.annotation, type) else object for name, entry in KNOWN.items()}


def check(name: str, value: object) -> Any:
    return typed(name, value, KNOWN[name].annotation, KNOWN[name].default)


def read(tmp_path: Path, text: str) -> SearchSpace:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    return read_space(str(file), check, TYPES)


def test_the_default_space_is_valid_and_holds_what_it_starts_from() -> None:
    space = read_space("", check, TYPES)
    assert len(space.entries) == sum(": {" in line for line in default_space_text().splitlines()) > 10
    space.require({name: KNOWN[name].default for name in space.entries})
    assert set(space.distributions()) == set(space.entries)


def test_a_drawn_value_lies_in_the_space(tmp_path: Path) -> None:
    import optuna

    space = read(
        tmp_path,
        "lr0: {low: 0.001, high: 0.1, log: true}\nclose_mosaic: {low: 0, high: 20, step: 5}\n"
        "optimizer: {choices: [SGD, AdamW]}\ncos_lr: {choices: [true, false]}\n"
        "scale: {low: 0.1, high: 0.9, step: 0.2}\n",
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        drawn = study.ask(space.distributions()).params
        assert all(space.entries[name].holds(value) for name, value in drawn.items()), drawn
        TrainOptions.from_flat(drawn)


def test_equal_spaces_have_equal_fingerprints(tmp_path: Path) -> None:
    one = read(tmp_path, "lr0: {low: 0.001, high: 0.1}\nmomentum: {low: 0.5, high: 0.9}\n").fingerprint
    two = read(tmp_path, "momentum: {high: 0.9, low: 0.5}\nlr0: {low: 1.0e-3, high: 0.1}\n").fingerprint
    other = read(tmp_path, "lr0: {low: 0.001, high: 0.2}\nmomentum: {low: 0.5, high: 0.9}\n").fingerprint
    assert one == two != other


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names nothing"),
        ("[1, 2]", "names nothing"),
        ("lr_0: {low: 1, high: 2}", "did you mean lr0"),
        ("lr0: {low: 0.1, high: 0.01}", "empty"),
        ("lr0: {low: 0.1, high: 0.1}", "empty"),
        ("lr0: {low: 0.1}", "two numbers"),
        ("lr0: 0.1", "needs `{low"),
        ("lr0: {low: 0.1, high: 1, lag: true}", "needs `{low"),
        ("weight_decay: {low: 0, high: 1, log: true}", "starts above 0"),
        ("lr0: {low: 0.1, high: 1, log: true, step: 0.1}", "both log and step"),
        ("lr0: {low: 0.1, high: 1, step: 0}", "above 0"),
        ("lr0: {low: 0.1, high: 1, step: .inf}", "above 0"),
        ("close_mosaic: {low: 0, high: 20, step: 0.5}", "whole step"),
        ("close_mosaic: {low: 0, high: 20, step: 2.5}", "whole step"),
        ("lr0: {low: 0.1, high: 1, log: 3}", "true or false"),
        ("scale: {low: 0.1, high: 3}", "out of range"),
        ("lr0: {low: a, high: b}", "lr0"),
        ("optimizer: {choices: []}", "at least one"),
        ("optimizer: {choices: [SGD, SGD]}", "twice"),
        ("optimizer: {choices: [Adagrad]}", "Adagrad"),
        ("optimizer: {choices: [SGD], log: true}", "nothing beside"),
        ("lr0: {low: 1, high: 2", "not YAML"),
    ],
)
def test_a_bad_space_is_answered_by_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("{", r"\{")) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_whole_step_may_be_spelled_with_a_point(tmp_path: Path) -> None:
    spaces = [read(tmp_path, f"close_mosaic: {{low: 0, high: 20, step: {step}}}") for step in ("5", "5.0")]
    assert spaces[0].distributions() == spaces[1].distributions()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot read"):
        read_space(str(tmp_path / "none.yaml"), check, TYPES)


def test_a_start_outside_of_the_space_is_refused() -> None:
    space = SearchSpace(entries={"lr0": Range(low=0.1, high=1.0), "cos_lr": Choices(values=(True,))})
    with pytest.raises(UserError, match=r"lr0=0\.01"):
        space.require({"lr0": 0.01, "cos_lr": True})
    with pytest.raises(UserError, match="cos_lr=False"):
        space.require({"lr0": 0.2, "cos_lr": False})
