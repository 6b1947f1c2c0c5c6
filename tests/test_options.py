"""Options: flat names over the rooms, the same spellings everywhere, and YAML that repeats a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from paceline.arguments import ARGUMENTS
from paceline.errors import UserError
from paceline.option_values import BOUNDS
from paceline.options import (
    BenchOptions,
    DataCheckOptions,
    DataConvertOptions,
    DataPackOptions,
    DataPlotOptions,
    Options,
    PredictOptions,
    TrainOptions,
    TuneOptions,
    ValOptions,
    option_fields,
    settle_resume,
)

ALL = (
    TrainOptions,
    TuneOptions,
    BenchOptions,
    ValOptions,
    PredictOptions,
    DataCheckOptions,
    DataPackOptions,
    DataConvertOptions,
    DataPlotOptions,
)


@pytest.mark.parametrize("options", ALL)
def test_flat_names_round_trip(options: type[Options]) -> None:
    default = options()
    flat = default.to_flat()
    assert options.from_flat(flat) == default
    assert options.from_flat({name: str(value) for name, value in flat.items() if value != ()}) == default


@pytest.mark.parametrize("options", ALL)
def test_names_are_unique_over_rooms(options: type[Options]) -> None:
    rooms = {entry.room for entry in option_fields(options).values()}
    assert len(option_fields(options)) == len(options().to_flat())  # a name that two rooms have fails an assertion
    assert "" in rooms


def test_every_bound_belongs_to_an_option_and_every_number_has_bounds() -> None:
    fields = {name: entry for options in ALL for name, entry in option_fields(options).items()}
    assert set(BOUNDS) <= set(fields)
    numbers = {name for name, entry in fields.items() if entry.annotation in (int, float)}
    assert numbers <= {*BOUNDS, "imgsz"}


def test_none_is_a_choice_where_it_is_one_and_else_the_default() -> None:
    assert TuneOptions.from_flat({"pruner": "none", "trials": 1}).tune.pruner == "none"
    assert TuneOptions.from_flat({"pruner": None, "trials": 1}).tune.pruner == "halving"
    assert TuneOptions.from_flat({"sampler": "none", "trials": 1}).tune.sampler == "tpe"


def test_yaml_repeats_the_options(tmp_path: Path) -> None:
    given = {
        "imgsz": 320,
        "amp": False,
        "classes": [0, 2],
        "time": "30m",
        "name": "no",
        "lr0": 1e-5,
        "project": "a b: c",
    }
    options = TrainOptions.from_flat(given)
    options.write(tmp_path / "config.yaml")
    assert TrainOptions.read(tmp_path / "config.yaml") == options


ARGS = {argument.name: argument.neutral[0] for argument in ARGUMENTS if argument.neutral} | {
    "task": "detect", "mode": "train", "model": "yolo11s.yaml", "data": "pets.yaml", "epochs": 7, "batch": 8,
    "verbose": True, "split": "val", "save_json": False, "save_txt": False, "conf": None, "source": None,
    "show_conf": True, "format": "torchscript", "keras": False, "int8": False, "dynamic": False, "simplify": True,
    "opset": None, "workspace": None, "nms": False, "tracker": "botsort.yaml", "save_dir": "runs/detect/train",
}  # fmt: skip
"""Arguments of every mode, as the reference writes them beside a run."""


def test_the_arguments_that_the_reference_wrote_beside_a_run_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text(yaml.safe_dump(ARGS))
    expected = {"model": "yolo11s.yaml", "data": "pets.yaml", "epochs": 7, "batch": 8}
    assert TrainOptions.read(file) == TrainOptions.from_flat(expected)
    wrong = {"erasing": (0.9, "erasing=0.9 is not taken"), "colour": ("red", "has no option colour")}
    for name, (value, sentence) in wrong.items():
        file.write_text(yaml.safe_dump(ARGS | {name: value}))
        with pytest.raises(UserError, match=sentence):
            TrainOptions.read(file)
    file.write_text(yaml.safe_dump({"epochs": 7, "split": "val"}))
    with pytest.raises(UserError, match="has no option split"):
        TrainOptions.read(file)


def test_several_mistakes_are_said_together() -> None:
    given = {"save": False, "imgsz": 500, "epochs": 3, "iterations": 300}
    with pytest.raises(UserError, match=r"^save=False .* leave save out\. imgsz=500 .* iterations=300 .* trials"):
        TuneOptions.from_flat(given)


def test_overrides_go_before_the_file(tmp_path: Path) -> None:
    TrainOptions.from_flat({"imgsz": 320, "epochs": 7}).write(tmp_path / "config.yaml")
    options = TrainOptions.read(tmp_path / "config.yaml", {"epochs": "3"})
    assert (options.data.imgsz, options.loop.epochs) == (320, 3)


@pytest.mark.parametrize(
    ("given", "room", "expected"),
    [
        ({"imgsz": "640"}, "data", {"imgsz": 640}),
        ({"imgsz": [320, 320]}, "data", {"imgsz": 320}),
        ({"imgsz": 320.0}, "data", {"imgsz": 320}),
        ({"amp": True}, "loop", {"amp": "auto"}),
        ({"amp": "False"}, "loop", {"amp": "off"}),
        ({"amp": "bf16"}, "loop", {"amp": "bf16"}),
        ({"cache": True}, "data", {"cache": "ram"}),
        ({"cache": "disk"}, "data", {"cache": "disk"}),
        ({"cache": "device"}, "data", {"cache": "device"}),
        ({"cache": "False"}, "data", {"cache": "none"}),
        ({"cache": "none"}, "data", {"cache": "none"}),
        ({"cache": None}, "data", {"cache": "auto"}),
        ({"optimizer": "sgd"}, "optim", {"optimizer": "SGD"}),
        ({"optimizer": "ADAMW"}, "optim", {"optimizer": "AdamW"}),
        ({"resume": True}, "loop", {"resume": "true"}),
        ({"resume": "False"}, "loop", {"resume": ""}),
        ({"resume": "7"}, "loop", {"resume": "7"}),
        ({"resume": Path("runs/train")}, "loop", {"resume": "runs/train"}),
        ({"batch": "auto"}, "data", {"batch": -1, "memory": 0.8}),
        ({"batch": "AUTO", "memory": 0.5}, "data", {"batch": -1, "memory": 0.5}),
        ({"batch": -1}, "data", {"batch": -1, "memory": 0.8}),
        ({"batch": "-1"}, "data", {"batch": -1, "memory": 0.8}),
        ({"batch": 0.7}, "data", {"batch": -1, "memory": 0.7}),
        ({"batch": ".35"}, "data", {"batch": -1, "memory": 0.35}),
        ({"batch": 16.0}, "data", {"batch": 16, "memory": 0.8}),
        ({"batch": None}, "data", {"batch": 16}),
        ({"device": 0}, "loop", {"device": "0"}),
        ({"device": "cuda:1"}, "loop", {"device": "1"}),
        ({"device": [1]}, "loop", {"device": "1"}),
        ({"device": None}, "loop", {"device": "auto"}),
        ({"device": "cpu:0"}, "loop", {"device": "cpu"}),
        ({"device": "gpu"}, "loop", {"device": "cuda"}),
        ({"cos_lr": "1"}, "optim", {"cos_lr": True}),
        ({"cos-lr": "True"}, "optim", {"cos_lr": True}),
        ({"classes": "[0, 2]"}, "data", {"classes": (0, 2)}),
        ({"classes": "0,2"}, "data", {"classes": (0, 2)}),
        ({"classes": ["0", "2"]}, "data", {"classes": (0, 2)}),
        ({"classes": 3}, "data", {"classes": (3,)}),
        ({"classes": None}, "data", {"classes": ()}),
        ({"time": 1.5}, "loop", {"time": "1.5"}),
        ({"time": None}, "loop", {"time": ""}),
        ({"freeze": None}, "loop", {"freeze": 0}),
        ({"lr0": "1e-3"}, "optim", {"lr0": 0.001}),
        ({"epochs": "None"}, "loop", {"epochs": 100}),
    ],
)
def test_spellings(given: dict[str, object], room: str, expected: dict[str, object]) -> None:
    part = getattr(TrainOptions.from_flat(given), room)
    assert {name: getattr(part, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"imgsz": 500}, "the nearest are 480 and 512"),
        ({"imgsz": 20}, "the nearest is 32"),
        ({"imgsz": 0}, "the nearest is 32"),
        ({"imgsz": "640,480"}, "give the longer one alone"),
        ({"imgsz": "large"}, "not a whole number"),
        ({"epochs": 0}, "at least 1"),
        ({"epochs": 2.5}, "not a whole number"),
        ({"epochs": True}, "not a whole number"),
        ({"batch": 0}, "at least 1"),
        ({"batch": -2}, "at least 1"),
        ({"batch": 1.5}, "not a whole number"),
        ({"batch": 0.7, "memory": 0.5}, "drop one"),
        ({"memory": 0}, "above 0 and at most 1"),
        ({"fraction": 1.5}, "above 0 and at most 1"),
        ({"fraction": 0}, "above 0 and at most 1"),
        ({"fliplr": -0.1}, "at least 0 and at most 1"),
        ({"lr0": "nan"}, "above 0"),
        ({"lr0": "inf"}, "above 0"),
        ({"weight_decay": "much"}, "not a number"),
        ({"cos_lr": "maybe"}, "cos_lr=true or cos_lr=false"),
        ({"optimizer": "Adam"}, "auto, SGD or AdamW"),
        ({"amp": "fp8"}, "choose auto, off, bf16 or fp16"),
        ({"device": "0,gpu"}, "choose auto, cpu, cuda"),
        ({"devices": -1}, "at least 0"),
        ({"limit_silence": 1}, "at least 5"),
        ({"device": "tpu"}, "choose auto, cpu, cuda"),
        ({"device": "mps"}, "means Apple's GPUs, which are not supported yet; write device=cpu"),
        ({"device": "xpu:0"}, "means Intel's GPUs"),
        ({"lr": 0.1}, "did you mean lr0?"),
        ({"weights": "yolov5s.pt"}, "did you mean model?"),
        ({"Size": 320}, "did you mean imgsz?"),
        ({"classes": "-1"}, "at least 0"),
        ({"time": "soon"}, "30m"),
        ({"time": "0h"}, "30m"),
        ({"freeze": [0, 1]}, "one number"),
        ({"pretrained": "best.pt"}, "cannot read yet; leave it out"),
        ({"pretrained": "runs/train"}, "model=runs/train"),
        ({"epoch": 3}, "did you mean epochs?"),
        ({"close_mosiac": 3}, "did you mean close_mosaic?"),
        ({"qqqq": 3}, "--help"),
        ({"compile": True}, "tune_step=full"),
    ],
)
def test_mistakes_are_named_with_their_mend(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace("?", r"\?").replace("+", r"\+")) as caught:
        TrainOptions.from_flat(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("- imgsz\n- 320\n", "not a mapping"),
        ("imgsz: [320\n", "not YAML"),
        ("imgsz: 321\n", "nearest are 320 and 352"),
        ("imgzs: 320\n", "did you mean imgsz"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=sentence) as caught:
        TrainOptions.read(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="check the path"):
        TrainOptions.read(tmp_path / "none.yaml")


def test_validation_hands_its_own_fields_to_the_data_room() -> None:
    options = ValOptions.from_flat({"data": "shapes", "imgsz": 320, "batch": 4, "single_cls": True, "classes": 1})
    assert (options.data.data, options.data.imgsz, options.data.batch) == ("shapes", 320, 4)
    assert (options.data.single_cls, options.data.classes) == (True, (1,))


def test_resume_keeps_the_runs_own_options() -> None:
    assert settle_resume({"epochs": 3}) == {"epochs": 3}
    assert settle_resume({"resume": False, "epochs": 3}) == {"resume": False, "epochs": 3}
    assert settle_resume({"resume": "True", "model": "a/weights/last.safetensors"}) == {
        "resume": "a/weights/last.safetensors"
    }
    assert settle_resume({"resume": "runs/train", "model": "yolo11n"}) == {"resume": "runs/train"}
    for newest in ({}, {"model": ""}, {"model": None}, {"model": "yolo11n"}, {"model": "yolo11n.yaml"}):
        assert settle_resume({"resume": True} | newest) == {"resume": True}
    with pytest.raises(UserError, match="leave out epochs, imgsz"):
        settle_resume({"resume": True, "imgsz": 320, "epochs": 3})


def test_options_never_import_torch() -> None:
    code = "import sys, paceline.options, paceline.cli.main, paceline.cli.data, paceline.cli.runs; "
    done = subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules or 'tyro' in sys.modules)"])
    assert done.returncode == 0


@pytest.mark.parametrize(("spelled", "value"), [(True, 0.5), ("true", 0.5), (False, 0.0), ("0.25", 0.25), (0, 0.0)])
def test_multi_scale_is_a_share_or_yes_or_no(spelled: object, value: float) -> None:
    assert TrainOptions.from_flat({"multi_scale": spelled}).augment.multi_scale == value


@pytest.mark.parametrize("batch", ["auto", -1, 0.7])
@pytest.mark.parametrize("command", [ValOptions, PredictOptions])
def test_only_training_measures_its_batch(command: type[Options], batch: object) -> None:
    with pytest.raises(UserError, match=rf"chooses a batch by measuring training; give {command.COMMAND} a number"):
        command.from_flat({"batch": batch})
