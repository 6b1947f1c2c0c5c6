"""Image files of every kind that a decoder meets, the sets that are made of them, and a codec for tests."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from PIL import Image

from paceline.data.decode import decode_compact

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from paceline.data.device.resident import DeviceImages


class FakeCodec:
    """The host's decoder in a codec's clothes; `spoil` may change what comes out, by the place among all files."""

    def __init__(self, spoil: Callable[[int, Tensor], Tensor | None] = lambda _, pixels: pixels) -> None:
        self.calls: list[tuple[int, int]] = []
        self._spoil = spoil
        self._count = 0

    def decode(self, encoded: Sequence[bytes], planes: int) -> list[Tensor | None]:
        self.calls.append((len(encoded), planes))
        out = []
        for file in encoded:
            pixels = torch.from_numpy(decode_compact(file))
            assert pixels.ndim == (3 if planes == 3 else 2)
            out.append(self._spoil(self._count, pixels))
            self._count += 1
        return out


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


def write_many(folder: Path, count: int) -> None:
    """Write a YOLO data set of many small JPEG files of different sizes, each with one box."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (height, width) in enumerate(rng.integers(16, 60, (count, 2)).tolist()):
        colours = rng.integers(0, 255, (1, 2, 3), dtype=np.uint8)
        picture = cv2.resize(colours, (width, height), interpolation=cv2.INTER_LINEAR)
        cv2.imwrite(str(folder / "images" / f"{number:05d}.jpg"), picture)
        (folder / "labels" / f"{number:05d}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (folder / "data.yaml").write_text("train: images\nval: images\nnames: [thing]\n")


def pixels_of(images: DeviceImages, number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels of an image of a set on a device, as the host would hold them."""
    height, width, planes = (int(table[number]) for table in (images.heights, images.widths, images.planes))
    start = int(images.offsets[number])
    flat = images.pixels[start : start + height * width * planes].cpu().numpy()
    return flat.reshape((height, width) if planes == 1 else (height, width, planes))
