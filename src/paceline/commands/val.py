"""`paceline val`: scores weights on a part of a data set."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.addresses import shown
from paceline.commands.device import make_current, resolve_device
from paceline.commands.evaluation import evaluate_network
from paceline.commands.pictures import RunPictures
from paceline.commands.resume import options_of
from paceline.commands.weights import find_weights, load_network
from paceline.data.dataset import open_data_set
from paceline.data.loader import EvalLoader
from paceline.errors import UserError
from paceline.records import RunFolder, to_jsonable, write_atomically

if TYPE_CHECKING:
    from paceline.data.config import DataConfig
    from paceline.data.index import Index
    from paceline.evaluation.evaluator import Evaluation
    from paceline.options import TrainOptions, ValOptions

log = logging.getLogger("paceline")


def validate(options: ValOptions) -> Evaluation:
    """Score the weights that `options.model` names; writes figures, and what else was asked for, into a run folder.

    The network computes in float32. Raises UserError for whatever the user can mend.
    """
    if not options.model:
        raise UserError("val needs weights to evaluate: model=runs/train, or a .safetensors file.")
    device = make_current(resolve_device(options.validation.device))
    loaded = load_network(options.model, None)
    trained = _trained_options(options.model)
    data = _data_config(options, trained, loaded.imgsz or 640)
    index = _split(options, data, trained)
    if len(index.names) != loaded.network.num_classes:
        mend = "name the data set that they belong to"
        if loaded.network.num_classes == 1:
            mend += ", or single_cls=True where all classes were trained as one"
        raise UserError(
            f"The number of classes of {shown(data.data)} is {len(index.names)}, but the weights were trained on "
            f"{loaded.network.num_classes}; {mend}."
        )
    folder = RunFolder.create(options.run.project, options.run.name, exist_ok=options.run.exist_ok, default_name="val")
    with EvalLoader(index, data.imgsz, batch=data.batch, workers=data.workers, cache="none", rect=data.rect) as batches:
        evaluation = evaluate_network(
            loaded.network, batches, index, options.postprocess, device=device, amp_dtype=None
        )
        assert evaluation is not None, "one process scores by itself"
        options.write(folder.config)
        folder.append("evaluation", evaluation.record)
        if options.validation.plots:
            RunPictures(run=folder, names=index.names).evaluation(evaluation, batches, index)
    if options.validation.save_json:
        _write_detections(folder.path / "detections.json", evaluation, index)
    log.info("Figures and pictures are in %s.", folder.path)
    return evaluation


def _trained_options(model: str) -> TrainOptions | None:
    """Read the options of the run that weights come from; None for weights outside a run folder.

    A run keeps its weights in its folder `weights`: what lies beside weights anywhere else is not their run's.
    """
    source = find_weights(model)
    if source is None or source.absolute().parent.name != "weights":
        return None
    folder = RunFolder(path=source.absolute().parent.parent)
    return options_of(folder) if folder.config.is_file() else None


def _data_config(options: ValOptions, trained: TrainOptions | None, imgsz: int) -> DataConfig:
    """Fill in what the user left open from the run that the weights come from.

    Its classes are taken over with its data set, be that named or not.
    """
    data = options.data
    if not data.data:
        if trained is None:
            raise UserError("val needs a data set: data=path/to/data.yaml (the weights' run folder does not name one).")
        data = dataclasses.replace(data, data=trained.data.data)
    if trained is not None and _same_data(data.data, trained.data.data):
        data = dataclasses.replace(
            data,
            single_cls=data.single_cls or trained.data.single_cls,
            classes=data.classes or trained.data.classes,
        )
    return data if data.imgsz else dataclasses.replace(data, imgsz=imgsz)


def _same_data(first: str, second: str) -> bool:
    """Tell whether two names mean one data set: equal ones do, but for signatures, and paths of one file or folder."""
    try:
        return shown(first) == shown(second) or Path(first).samefile(second)
    except OSError:
        return False


def _split(options: ValOptions, data: DataConfig, trained: TrainOptions | None) -> Index:
    """Open the part to evaluate; a set without a split of its own is divided by the seed, as the training did."""
    split = options.validation.split
    data_set = open_data_set(data, seed=trained.loop.seed if trained else 0, splits=(split,))
    index = {"train": data_set.train, "val": data_set.val, "test": data_set.test}[split]
    if index is None or len(index) == 0:
        raise UserError(f"{shown(data.data)} has no {split} images; choose another split.")
    if data_set.divided and split == "val" and trained is None:
        log.warning(
            "Some of the images that are scored may have been trained on: %s has no val images of its own, and the "
            "seed that divided it in training is known to the run folder alone. Name that (model=runs/train), or a "
            "data set with a val split.",
            shown(data.data),
        )
    return index


def _write_detections(path: Path, evaluation: Evaluation, index: Index) -> None:
    entries = evaluation.detections.to_coco_json(index.image_ids, index.category_ids)
    write_atomically(path, json.dumps(to_jsonable(entries), allow_nan=False).encode())
