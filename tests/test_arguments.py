"""The table of the reference's arguments: it agrees with our options and with its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.arguments import ARGUMENTS, COMMANDS, Argument, find, is_neutral, markdown
from paceline.errors import UserError
from paceline.options import BenchOptions, Options, PredictOptions, TrainOptions, TuneOptions, ValOptions, option_fields

CLASSES: dict[str, type[Options]] = {
    "train": TrainOptions,
    "val": ValOptions,
    "predict": PredictOptions,
    "tune": TuneOptions,
    "bench": BenchOptions,
}

# What the public pages on usage/cfg and on the train, val and predict modes list.
DOCUMENTED = {
    "train": """model data epochs time patience batch imgsz save save_period cache device workers project name exist_ok
        pretrained optimizer seed deterministic verbose single_cls classes rect multi_scale cos_lr close_mosaic resume
        amp fraction profile freeze lr0 lrf momentum weight_decay warmup_epochs warmup_momentum warmup_bias_lr box cls
        cls_pw dfl pose kobj rle angle nbs overlap_mask mask_ratio dropout val plots compile max_det hsv_h hsv_s hsv_v
        degrees translate scale shear perspective flipud fliplr bgr mosaic mixup cutmix copy_paste copy_paste_mode
        auto_augment erasing augmentations task mode""",
    "val": """model data imgsz batch save_json conf iou max_det half device dnn plots classes rect split project name
        verbose save_txt save_conf workers augment agnostic_nms single_cls visualize compile end2end exist_ok""",
    "predict": """model source conf iou imgsz rect half device batch max_det vid_stride stream_buffer visualize augment
        agnostic_nms classes retina_masks embed project name stream verbose compile end2end show save save_frames
        save_txt save_conf save_crop show_labels show_conf show_boxes line_width exist_ok""",
    "tune": "iterations space use_ray gpu_per_trial grace_period epochs optimizer name resume",
    "bench": "model data imgsz half int8 device verbose format",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_documented_argument_has_a_row(command: str) -> None:
    missing = [name for name in DOCUMENTED[command].split() if find(command, name) is None]
    assert missing == []


def test_each_argument_has_one_row_per_command() -> None:
    rows = [(argument.name, command) for argument in ARGUMENTS for command in argument.commands]
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("argument", ARGUMENTS, ids=lambda argument: f"{argument.name}-{argument.commands[0]}")
def test_accepted_arguments_are_options_and_others_are_not(argument: Argument) -> None:
    for command in argument.commands:
        assert (argument.name in option_fields(CLASSES[command])) == (argument.status == "accepted")


@pytest.mark.parametrize("argument", [entry for entry in ARGUMENTS if entry.neutral], ids=lambda entry: entry.name)
def test_neutral_values_change_nothing_and_others_get_one_sentence(argument: Argument) -> None:
    for command in argument.commands:
        options = CLASSES[command]
        for value in argument.neutral or ():
            assert options.from_flat({argument.name: value}) == options()
            assert options.from_flat({argument.name: str(value)}) == options()
        with pytest.raises(UserError, match="is not taken") as caught:
            options.from_flat({argument.name: "another"})
        assert str(caught.value).count(". ") == 0
        assert str(caught.value).endswith(".")


def test_unknown_names_are_not_the_tables() -> None:
    assert not is_neutral("train", "zzz", 1)
    assert not is_neutral("val", "mosaic", 1.0)


def test_the_page_is_made_from_the_table() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "arguments.md"
    assert page.read_text(encoding="utf-8") == markdown()
