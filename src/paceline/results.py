"""Results: what was found in one image, as tensors, with a picture, JSON and label files made from them.

Arrays of pixels have their colours in the order blue, green, red here, as OpenCV reads and writes them and as other
YOLO trainers do: the image that a user passes in, `orig_img`, and what `plot` gives back.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from paceline.attributes import missing
from paceline.records import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """N boxes of one image, best first."""

    xyxy: Tensor
    """N4, float32, corners in pixels of the original image."""
    conf: Tensor
    """N, float32, scores in (0, 1]."""
    cls: Tensor
    """N, int64, class numbers."""
    orig_shape: tuple[int, int]
    """Height and width of the original image, in pixels."""

    if not TYPE_CHECKING:  # or else every name would pass the type checker

        def __getattr__(self, name: str) -> NoReturn:
            """Say what to write instead of an attribute that other YOLO trainers have."""
            raise missing(self, name)

    def __len__(self) -> int:
        return len(self.conf)

    def __getitem__(self, index: int | slice | Tensor) -> Boxes:
        """Pick some of the boxes; a single number gives one box, still as `Boxes`."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"there is no box {index} among {len(self)}")
            rows: slice | Tensor = slice(index, index + 1 or None)
        else:
            rows = index
        return Boxes(xyxy=self.xyxy[rows], conf=self.conf[rows], cls=self.cls[rows], orig_shape=self.orig_shape)

    def __iter__(self) -> Iterator[Boxes]:
        return (self[row] for row in range(len(self)))

    @property
    def xywh(self) -> Tensor:
        """N4, centre, width and height in pixels."""
        low, high = self.xyxy[:, :2], self.xyxy[:, 2:]
        return torch.cat([(low + high) / 2, high - low], dim=1)

    @property
    def xyxyn(self) -> Tensor:
        """N4, corners as shares of the image's width and height."""
        return self.xyxy / self._size()

    @property
    def xywhn(self) -> Tensor:
        """N4, centre, width and height as shares of the image's width and height."""
        return self.xywh / self._size()

    @property
    def data(self) -> Tensor:
        """N6, float32: corners in pixels, score, class."""
        return torch.cat([self.xyxy, self.conf[:, None], self.cls[:, None].to(self.xyxy.dtype)], dim=1)

    def _size(self) -> Tensor:
        height, width = self.orig_shape
        return torch.tensor([width, height, width, height], dtype=self.xyxy.dtype, device=self.xyxy.device)


@dataclass(frozen=True, kw_only=True)
class Results:
    """What was found in one image."""

    path: str
    """File of the image; `image0`, `image1`, ... for arrays."""
    orig_img: NDArray[np.uint8]
    """HW3, BGR, the image as it was decoded, upright."""
    boxes: Boxes
    names: Mapping[int, str]
    """Class names by number."""
    speed: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds per image of its batch: `preprocess`, `inference`, `postprocess`."""

    if not TYPE_CHECKING:  # or else every name would pass the type checker

        def __getattr__(self, name: str) -> NoReturn:
            """Say what to write instead of an attribute that other YOLO trainers have."""
            raise missing(self, name)

    def __len__(self) -> int:
        return len(self.boxes)

    def __str__(self) -> str:
        """Say what was found: `3 discs, 1 ring`."""
        counts = Counter(self.boxes.cls.tolist())
        parts = [f"{counts[number]} {self.names[number]}" for number in sorted(counts)]
        return ", ".join(parts) or "nothing"

    def __repr__(self) -> str:
        """Name the image and what was found, without its pixels."""
        height, width = self.orig_shape
        return f"<Results {self.path} {width} x {height}: {self}>"

    @property
    def orig_shape(self) -> tuple[int, int]:
        """Height and width of the image, in pixels."""
        return self.orig_img.shape[0], self.orig_img.shape[1]

    def plot(self, *, conf: bool = True) -> NDArray[np.uint8]:
        """Draw the boxes into a copy of the image: HW3, uint8, BGR. `conf` writes the scores too."""
        import numpy as np

        return np.ascontiguousarray(self._drawn(conf=conf)[..., ::-1])

    def save(self, filename: str | Path, *, conf: bool = True) -> Path:
        """Write the picture with boxes as JPEG or PNG, by the name's ending.

        Raises UserError when the ending is another or the file cannot be written.
        """
        from paceline.drawing.boxes import save_picture

        save_picture(Path(filename), self._drawn(conf=conf))
        return Path(filename)

    def to_dicts(self) -> list[dict[str, object]]:
        """List the boxes as plain values: name, class, confidence, and box as x1, y1, x2, y2 in pixels."""
        rows = zip(self.boxes.xyxy.tolist(), self.boxes.conf.tolist(), self.boxes.cls.tolist(), strict=True)
        return [
            {
                "name": self.names[label],
                "class": label,
                "confidence": round(score, 5),
                "box": {key: round(value, 3) for key, value in zip(("x1", "y1", "x2", "y2"), corners, strict=True)},
            }
            for corners, score, label in rows
        ]

    def to_json(self) -> str:
        """Write the boxes as a JSON list; see `to_dicts`."""
        return json.dumps(self.to_dicts(), indent=1)

    def save_txt(self, file: str | Path, *, save_conf: bool = False) -> Path:
        """Write a YOLO label file: class, centre, width and height as shares, and the score if asked for.

        The file is empty when nothing was found. Raises UserError when it cannot be written.
        """
        rows = zip(self.boxes.cls.tolist(), self.boxes.xywhn.tolist(), self.boxes.conf.tolist(), strict=True)
        lines = []
        for label, places, score in rows:
            values = [*places, score] if save_conf else places
            lines.append(" ".join([str(label), *(f"{value:.6f}" for value in values)]) + "\n")
        write_atomically(Path(file), "".join(lines).encode())
        return Path(file)

    def _drawn(self, *, conf: bool) -> NDArray[np.uint8]:
        """Draw the picture with boxes: HW3, RGB."""
        from paceline.drawing.boxes import draw_boxes

        return draw_boxes(
            self.orig_img[..., ::-1],
            self.boxes.xyxy.cpu().numpy(),
            self.boxes.cls.cpu().numpy(),
            self.boxes.conf.cpu().numpy() if conf else None,
            [self.names[number] for number in sorted(self.names)],
        )
