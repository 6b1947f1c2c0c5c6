"""Boxes on pictures: one image with its boxes, a grid of training images, truth beside prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.drawing.palette import class_colour, ink_on
from paceline.drawing.text import one_line, text_mask
from paceline.errors import UserError
from paceline.records import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    from paceline.drawing.palette import Colour

    Picture = NDArray[np.uint8]
    """HW3, RGB."""
    Place = tuple[int, int, int, int]
    """Whole pixels, xyxy, half open."""

_GAP_PX = 6
_CAPTION_PX = 15
_CELL_PX = (480, 640)
_WORST_OVERLAP = 0.25
_MOST_COVERED = 0.25
_ALWAYS_LABELLED = 5


@dataclass(frozen=True, kw_only=True)
class _Label:
    """A word on a coloured plate, and the box (xyxy, px) that it belongs to."""

    mask: NDArray[np.uint8]
    pad: int
    colour: Colour
    box: Place

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.mask.shape[0] + 2 * (self.pad // 2), self.mask.shape[1] + 2 * self.pad


@dataclass(kw_only=True)
class _Taken:
    """The places (xyxy, px) of the labels that are drawn already."""

    height: int
    width: int
    places: NDArray[np.int64]
    count: int = 0
    covered: int = 0

    @property
    def is_full(self) -> bool:
        return self.count >= _ALWAYS_LABELLED and self.covered > _MOST_COVERED * self.height * self.width

    def add(self, place: Place) -> None:
        self.places[self.count] = place
        self.count += 1
        self.covered += (place[2] - place[0]) * (place[3] - place[1])

    def overlap(self, place: Place) -> int:
        """Pixels of `place` that labels cover, counted once per label."""
        others = self.places[: self.count]
        shared = np.minimum(others[:, 2:], place[2:]) - np.maximum(others[:, :2], place[:2])
        return int(np.maximum(shared, 0).prod(axis=1).sum())


def draw_boxes(
    image_HW3: ArrayLike,
    boxes_N4: ArrayLike,
    labels_N: ArrayLike,
    scores_N: ArrayLike | None,
    names: Sequence[str],
) -> Picture:
    """Draw boxes (xyxy, px) with class name and score into a copy of a uint8 RGB image.

    Frames lie within their boxes, on whole pixels; smaller boxes lie on top of larger ones. Lines and words grow with
    the image and shrink with the box. A label finds a free place inside the image; the weaker one (lower score,
    else smaller box) is left out where it would cover another, or once labels hide a quarter of the image. Boxes that
    are not finite or lie outside are passed over.
    """
    picture = np.array(image_HW3, dtype=np.uint8, order="C")
    height, width = picture.shape[:2]
    corners = np.asarray(boxes_N4, dtype=np.float64).reshape(-1, 4)
    labels = np.asarray(labels_N, dtype=np.int64).reshape(-1)
    scores = None if scores_N is None else np.asarray(scores_N, dtype=np.float64).reshape(-1)
    pixels, rows = _to_pixels(corners, height, width)
    areas = (pixels[:, 2] - pixels[:, 0]) * (pixels[:, 3] - pixels[:, 1])
    by_size = np.argsort(-areas, kind="stable")
    thickness = max(round((height + width) / 2 / 250), 1)
    for k in by_size:
        _draw_frame(picture, pixels[k], class_colour(int(labels[rows[k]])), thickness)
    by_strength = by_size if scores is None else np.argsort(-scores[rows], kind="stable")
    taken = _Taken(height=height, width=width, places=np.zeros((len(rows), 4), dtype=np.int64))
    for k in by_strength:
        if taken.is_full:
            break
        score = None if scores is None else float(scores[rows[k]])
        _draw_label(picture, pixels[k], int(labels[rows[k]]), score, names, taken)
    return picture


def batch_picture(
    images: ArrayLike,
    boxes_BG4: ArrayLike,
    labels_BG: ArrayLike,
    valid_BG: ArrayLike,
    names: Sequence[str],
    *,
    columns: int = 4,
    most: int = 16,
) -> Picture:
    """Lay out the first `most` images of a batch (uint8, B3HW or BHW3) with their boxes (xyxy, px) in a grid."""
    pictures = _channels_last(images)[:most]
    boxes, labels, valid = np.asarray(boxes_BG4), np.asarray(labels_BG), np.asarray(valid_BG, dtype=bool)
    cells = [_cell(picture, boxes[b][valid[b]], labels[b][valid[b]], None, names) for b, picture in enumerate(pictures)]
    return _grid(cells, columns)


def truth_and_prediction_picture(
    images: ArrayLike,
    boxes_BG4: ArrayLike,
    labels_BG: ArrayLike,
    valid_BG: ArrayLike,
    predicted_boxes_BD4: ArrayLike,
    predicted_scores_BD: ArrayLike,
    predicted_labels_BD: ArrayLike,
    count_B: ArrayLike,
    names: Sequence[str],
    *,
    captions: Sequence[str] | None = None,
    least_score: float = 0.25,
    columns: int = 2,
    most: int = 8,
) -> Picture:
    """Lay out pairs of pictures: on the left the truth, on the right the first `count` predictions.

    Images are uint8, B3HW or BHW3, boxes xyxy in their pixels; predictions below `least_score` are left out;
    `captions` (file names, say) stand over the truth.
    """
    pictures = _channels_last(images)[:most]
    boxes, labels, valid = np.asarray(boxes_BG4), np.asarray(labels_BG), np.asarray(valid_BG, dtype=bool)
    predicted, scores = np.asarray(predicted_boxes_BD4), np.asarray(predicted_scores_BD)
    predicted_labels, counts = np.asarray(predicted_labels_BD), np.asarray(count_B)
    pairs = []
    for b, picture in enumerate(pictures):
        shown = (np.arange(scores.shape[1]) < counts[b]) & (scores[b] >= least_score)
        truth = _cell(picture, boxes[b][valid[b]], labels[b][valid[b]], None, names)
        found = _cell(picture, predicted[b][shown], predicted_labels[b][shown], scores[b][shown], names)
        title = f"truth: {_boxes(int(valid[b].sum()))}" + (f" · {captions[b]}" if captions is not None else "")
        left = _with_caption(truth, title)
        right = _with_caption(found, f"prediction: {_boxes(int(shown.sum()))} with score ≥ {least_score:.2f}")
        pairs.append(np.concatenate([left, np.full((len(left), _GAP_PX // 2, 3), 255, np.uint8), right], axis=1))
    return _grid(pairs, columns)


def save_picture(path: Path, image_HW3: Picture) -> None:
    """Write an RGB picture as JPEG or PNG, by the name's ending.

    Raises UserError when the ending is another or the file cannot be written.
    """
    import cv2

    if path.suffix.lower() not in {".jpg", ".jpeg", ".png"}:
        raise UserError(f"Cannot write a picture as {path.name}: end its name in .jpg or .png.")
    assert image_HW3.ndim == 3, image_HW3.shape
    assert image_HW3.shape[2] == 3, image_HW3.shape
    options = [] if path.suffix.lower() == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 92]
    ok, content = cv2.imencode(path.suffix.lower(), image_HW3[..., ::-1], options)
    if not ok:
        raise UserError(f"Cannot write {path}: the picture is too large for this format, so end its name in .png.")
    write_atomically(path, content.tobytes())


def _to_pixels(corners: NDArray[np.float64], height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Whole pixels (half open, at least one each way, inside the image) of the boxes to draw, and their rows."""
    limit = np.array([width, height, width, height], dtype=np.float64)
    finite = np.isfinite(corners).all(axis=1)
    low, high = corners[:, :2], corners[:, 2:]
    rows = np.flatnonzero(finite & (low < limit[:2]).all(axis=1) & (high > 0).all(axis=1) & (high >= low).all(axis=1))
    pixels = np.clip(np.rint(corners[rows]), 0, limit).astype(np.int64)
    pixels[:, :2] = np.minimum(pixels[:, :2], limit[:2].astype(np.int64) - 1)
    pixels[:, 2:] = np.maximum(pixels[:, 2:], pixels[:, :2] + 1)
    return pixels, rows


def _draw_frame(picture: Picture, box: NDArray[np.int64], colour: Colour, thickness: int) -> None:
    left, top, right, bottom = box.tolist()
    thickness = min(thickness, max(min(right - left, bottom - top) // 6, 1))
    picture[top : top + thickness, left:right] = colour
    picture[max(bottom - thickness, top) : bottom, left:right] = colour
    picture[top:bottom, left : left + thickness] = colour
    picture[top:bottom, max(right - thickness, left) : right] = colour


def _draw_label(
    picture: Picture, box: NDArray[np.int64], label: int, score: float | None, names: Sequence[str], taken: _Taken
) -> None:
    """Draw the label of one box, where it finds a place."""
    plate = _label(box, label, score, names, taken.height, taken.width)
    place = None if plate is None else _free_place(plate, taken)
    if plate is not None and place is not None:
        taken.add(place)
        _draw_plate(picture, plate, place[0], place[1])


def _label(
    box: NDArray[np.int64], label: int, score: float | None, names: Sequence[str], height: int, width: int
) -> _Label | None:
    """Make the label of a box, long names shortened on narrow boxes; None where the image has no room for any."""
    left, top, right, bottom = box.tolist()
    largest = float(np.clip((height + width) / 2 / 48, 9, 64))
    size_px = round(float(np.clip(0.3 * ((right - left) * (bottom - top)) ** 0.5, 8, largest)))
    name = names[label] if 0 <= label < len(names) else str(label)
    for longest in (32, 24, 16, 10, 5, 2):
        text = one_line(name, longest) + ("" if score is None else f" {score:.2f}")
        plate = _Label(
            mask=text_mask(text, size_px),
            pad=max(size_px // 4, 2),
            colour=class_colour(label),
            box=(left, top, right, bottom),
        )
        rows, columns = plate.size_hw
        if rows <= height and columns <= width and (longest <= 16 or columns <= 1.5 * (right - left)):
            return plate
    return None


def _free_place(label: _Label, taken: _Taken) -> Place | None:
    """First free place of: above, below, above at the right end, inside; else the least crowded, or none."""
    rows, columns = label.size_hw
    left, top, right, bottom = label.box
    corners = [(left, top - rows), (left, bottom), (right - columns, top - rows), (left, top), (left, bottom - rows)]
    best, least = None, _WORST_OVERLAP * rows * columns
    for x, y in corners:
        if y < 0 or y + rows > taken.height:
            continue
        x = min(max(x, 0), taken.width - columns)
        place = (x, y, x + columns, y + rows)
        covered = taken.overlap(place)
        if covered < least:
            best, least = place, covered
        if covered == 0:
            break
    return best


def _draw_plate(picture: Picture, label: _Label, x: int, y: int) -> None:
    """Fill the plate and blend the ink over it."""
    rows, columns = label.size_hw
    top, left = label.pad // 2, label.pad
    plate = np.broadcast_to(np.array(label.colour, dtype=np.float32), (rows, columns, 3)).copy()
    share = label.mask[..., None].astype(np.float32) / 255
    words = plate[top : top + label.mask.shape[0], left : left + label.mask.shape[1]]
    words += (np.array(ink_on(label.colour), dtype=np.float32) - words) * share
    picture[y : y + rows, x : x + columns] = np.rint(plate).astype(np.uint8)


def _channels_last(images: ArrayLike) -> Picture:
    """Images as BHW3."""
    pixels = np.asarray(images)
    assert pixels.ndim == 4, pixels.shape
    assert pixels.dtype == np.uint8, pixels.dtype
    return pixels.transpose(0, 2, 3, 1) if pixels.shape[1] == 3 else pixels


def _cell(
    picture: Picture, boxes: NDArray[np.floating], labels: NDArray[np.integer],
    scores: NDArray[np.floating] | None, names: Sequence[str],
) -> Picture:  # fmt: skip
    """Draw the boxes into one image, itself brought to a size at which the labels can be read."""
    import cv2

    height, width = picture.shape[:2]
    side = max(height, width)
    scale = float(np.clip(side, *_CELL_PX)) / side
    rows, columns = max(round(height * scale), 1), max(round(width * scale), 1)
    if (rows, columns) != (height, width):
        way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        picture = cv2.resize(np.ascontiguousarray(picture), (columns, rows), interpolation=way)
    scaled = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * np.array([columns / width, rows / height] * 2)
    return draw_boxes(picture, scaled, labels, scores, names)


def _grid(cells: Sequence[Picture], columns: int) -> Picture:
    """Lay out equal cells row by row on white, with gaps between and around them."""
    if not cells:
        return np.full((64, 64, 3), 255, dtype=np.uint8)
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    height, width = cells[0].shape[:2]
    page = np.full((rows * (height + _GAP_PX) + _GAP_PX, columns * (width + _GAP_PX) + _GAP_PX, 3), 255, dtype=np.uint8)
    for k, cell in enumerate(cells):
        top, left = _GAP_PX + k // columns * (height + _GAP_PX), _GAP_PX + k % columns * (width + _GAP_PX)
        page[top : top + height, left : left + width] = cell
    return page


def _with_caption(picture: Picture, caption: str) -> Picture:
    """Put a strip with one line of text over the picture, cut at its width."""
    mask = text_mask(one_line(caption, 120), _CAPTION_PX)[:, : picture.shape[1]]
    strip = np.full((mask.shape[0] + _GAP_PX, picture.shape[1], 3), 255, dtype=np.uint8)
    strip[2 : 2 + mask.shape[0], : mask.shape[1]] -= mask[..., None]
    return np.concatenate([strip, picture])


def _boxes(count: int) -> str:
    return "1 box" if count == 1 else f"{count} boxes"
