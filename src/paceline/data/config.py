"""What a user may set about data and augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and how they are delivered."""

    data: str = "shapes"
    """Data set: `shapes`, a YOLO `data.yaml`, a COCO folder or JSON, a Pascal VOC folder, or a pack, or its address."""
    imgsz: int = 640
    """Side of the network's square input, in pixels; a multiple of 32."""
    batch: int = 16
    """Images per step over all devices; `auto` takes the fastest that fits, by measurement, and says so."""
    memory: float = 0.8
    """Share of the free memory that `batch=auto` may take; `batch=0.7` is both in one."""
    workers: int = -1
    """Loader threads; -1 takes one per core, 8 at most."""
    cache: Literal["auto", "none", "ram", "disk", "device"] = "auto"
    """Keep decoded images in memory, in a file, or on the GPU; `auto` measures, chooses, and says so."""
    rect: bool = False
    """Evaluate in rectangles that hold the images with little grey, instead of squares; training stays square."""
    render: Literal["auto", "host", "device"] = "auto"
    """Who draws the training pictures; `auto` times both on a GPU and says so, and is the host on a CPU."""
    decode: Literal["auto", "host", "device"] = "auto"
    """Who decodes what a GPU draws from, unless the host keeps it decoded; `auto` times both, given `gpu-decode`."""
    fraction: float = 1.0
    """Share of the training images to use."""
    single_cls: bool = False
    """Treat all classes as one."""
    classes: tuple[int, ...] = ()
    """Only use boxes of these classes; empty means all."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Strengths of the random transforms of training images."""

    hsv_h: float = 0.015
    """Hue shift, as a share of the whole circle, at most."""
    hsv_s: float = 0.7
    """Saturation gain: drawn from 1 ± this."""
    hsv_v: float = 0.4
    """Brightness gain: drawn from 1 ± this."""
    degrees: float = 0.0
    """Rotation, in degrees, at most."""
    translate: float = 0.1
    """Shift, as a share of the image, at most."""
    scale: float = 0.5
    """Zoom: drawn from 1 ± this."""
    shear: float = 0.0
    """Shear, in degrees, at most."""
    flipud: float = 0.0
    """Probability of a flip upside down."""
    fliplr: float = 0.5
    """Probability of a flip left to right."""
    mosaic: float = 1.0
    """Probability that four images are laid together."""
    partners: Literal["auto", "all", "window"] = "auto"
    """Mosaic takes partners from the whole set, or from samples that came shortly before; `auto`: small sets, large."""
    close_mosaic: int = 10
    """No mosaic, mixup, cutmix or copy-paste during this many last epochs."""
    perspective: float = 0.0
    """Perspective, from 0 to 0.001: change of depth per pixel from the middle, at most."""
    mixup: float = 0.0
    """Probability that a picture is blended with a second one, with a share from Beta(32, 32)."""
    cutmix: float = 0.0
    """Probability that a rectangle of a picture, if it is not blended, shows a second one."""
    copy_paste: float = 0.0
    """Probability that objects of another image are pasted along their outlines, where the set has polygons."""
    greyscale: float = 0.0
    """Probability that a picture loses its colour."""
    bgr: float = 0.0
    """Probability that the red and blue channels are swapped."""
    multi_scale: float = 0.0
    """Image size of each step: drawn from up to five multiples of 32 within ± this share of `imgsz`."""
