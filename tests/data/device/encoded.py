"""Image files of every kind that a decoder meets, and the sets that are made of them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.data.device.resident import DeviceImages


def jpeg(picture: Image.Image, orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    stream = io.BytesIO()
    picture.save(stream, "JPEG", exif=exif, quality=95, **options)
    return stream.getvalue()


def smooth(seed: int, height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def files() -> dict[str, bytes]:
    """Every kind of file: turned, odd, without colour, progressive, reduced by 1, 2, 4, other formats and spaces."""
    out = {}
    for orientation in range(1, 9):
        out[f"turned{orientation}.jpg"] = jpeg(smooth(orientation, 150, 201), orientation)
        out[f"small{orientation}.jpg"] = jpeg(smooth(orientation, 50, 67), orientation)
    out["grey.jpg"] = jpeg(smooth(20, 99, 133).convert("L"))
    out["grey_turned.jpg"] = jpeg(smooth(21, 61, 40).convert("L"), 6)
    out["large.jpg"] = jpeg(smooth(22, 255, 260))
    out["progressive.jpg"] = jpeg(smooth(23, 90, 90), progressive=True)
    out["inks.jpg"] = jpeg(smooth(24, 70, 80).convert("CMYK"))
    for name, picture in (("plain.png", smooth(25, 70, 129)), ("bits.png", smooth(26, 70, 70).convert("1"))):
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        out[name] = stream.getvalue()
    return out


def write_set(folder: Path) -> None:
    """Write a YOLO data set of these files, each with one box."""
    for name in ("images", "labels"):
        (folder / name).mkdir(exist_ok=True)
    for name, content in files().items():
        (folder / "images" / name).write_bytes(content)
        (folder / "labels" / name).with_suffix(".txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (folder / "data.yaml").write_text("train: images\nval: images\nnames: [thing]\n")


def pixels_of(images: DeviceImages, number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels of an image of a set on a device, as the host would hold them."""
    height, width, planes = (int(table[number]) for table in (images.heights, images.widths, images.planes))
    start = int(images.offsets[number])
    flat = images.pixels[start : start + height * width * planes].cpu().numpy()
    return flat.reshape((height, width) if planes == 1 else (height, width, planes))
