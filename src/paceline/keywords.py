"""The options as keyword arguments of the Python face, with the types that each of them takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class TrainKeywords(TypedDict, total=False):
    """Options of `YOLO.train`; see `paceline train --help` for what they mean."""

    project: str | Path
    name: str
    exist_ok: bool
    data: str | Path
    imgsz: int
    batch: float | Literal["auto"]
    memory: float
    workers: int
    cache: bool | Literal["auto", "none", "ram", "disk", "device"]
    rect: bool
    render: Literal["auto", "host", "device"]
    decode: Literal["auto", "host", "device"]
    fraction: float
    single_cls: bool
    classes: Sequence[int] | None
    hsv_h: float
    hsv_s: float
    hsv_v: float
    degrees: float
    translate: float
    scale: float
    shear: float
    flipud: float
    fliplr: float
    mosaic: float
    partners: Literal["auto", "all", "window"]
    close_mosaic: int
    perspective: float
    mixup: float
    cutmix: float
    copy_paste: float
    greyscale: float
    bgr: float
    multi_scale: float | bool
    box: float
    cls: float
    dfl: float
    optimizer: Literal["auto", "SGD", "AdamW"]
    lr0: float
    lrf: float
    momentum: float
    weight_decay: float
    warmup_epochs: float
    warmup_momentum: float
    warmup_bias_lr: float
    cos_lr: bool
    nbs: int
    clip: float
    epochs: int
    time: float | str | None
    patience: int
    seed: int
    amp: bool | Literal["auto", "off", "bf16", "fp16"]
    tune_step: Literal["off", "quick", "full"]
    device: str | int | Sequence[int] | None
    resume: bool | str | Path
    pretrained: bool
    freeze: int | None
    val: bool
    val_interval: int
    val_async: bool
    save_period: int
    plots: bool
    deterministic: bool
    parallel: Literal["auto", "data", "fsdp", "pipeline", "hybrid"]
    stages: int
    microbatches: int
    schedule: Literal["1f1b", "gpipe"]
    bn: str
    gradients: Literal["fp32", "bf16"]
    conf: float
    iou: float
    max_det: int
    agnostic_nms: bool
    devices: int
    limit_start: float
    limit_index: float
    limit_compile: float
    limit_step: float
    limit_evaluation: float
    limit_checkpoint: float
    limit_silence: float


class TuneKeywords(TrainKeywords, total=False):
    """Options of `YOLO.tune`; see `paceline tune --help` for what they mean."""

    space: str | Path | Mapping[str, object]
    trials: int
    objective: str
    confirm: int
    finalists: int
    cores_per_trial: int
    sampler: Literal["tpe", "gp", "qmc", "random"]
    pruner: Literal["halving", "hyperband", "median", "none"]
    storage: str


class BenchKeywords(TypedDict, total=False):
    """Options of `YOLO.benchmark`; see `paceline bench --help` for what they mean."""

    data: str | Path
    imgsz: int
    batch: int
    num_classes: int
    workers: int
    cache: bool | Literal["auto", "none", "ram", "disk", "device"]
    device: str | int | Sequence[int] | None
    devices: int
    amp: bool | Literal["auto", "off", "bf16", "fp16"]
    tune_step: Literal["off", "quick", "full"]
    seconds: float
    json: str | Path
    compare: str | Path


class ValKeywords(TypedDict, total=False):
    """Options of `YOLO.val`; see `paceline val --help` for what they mean."""

    project: str | Path
    name: str
    exist_ok: bool
    data: str | Path
    split: Literal["val", "test", "train"]
    imgsz: int
    batch: int
    workers: int
    rect: bool
    device: str | int | None
    single_cls: bool
    classes: Sequence[int] | None
    plots: bool
    save_json: bool
    verbose: bool
    conf: float | None
    iou: float
    max_det: int
    agnostic_nms: bool


class PredictKeywords(TypedDict, total=False):
    """Options of `YOLO.predict`; see `paceline predict --help` for what they mean."""

    project: str | Path
    name: str
    exist_ok: bool
    imgsz: int
    batch: int
    device: str | int | None
    classes: Sequence[int] | None
    save: bool
    save_txt: bool
    save_conf: bool
    save_json: bool
    show_conf: bool
    verbose: bool
    conf: float
    iou: float
    max_det: int
    agnostic_nms: bool
