from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
import torch

from paceline.drawing.boxes import batch_picture, draw_boxes, save_picture, truth_and_prediction_picture
from paceline.drawing.palette import class_colour
from paceline.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [f"class {k}" for k in range(80)]


def background(height: int, width: int) -> np.ndarray:
    """Pixels that no frame, plate or word has."""
    return np.broadcast_to(np.array([1, 2, 3], dtype=np.uint8), (height, width, 3)).copy()


def scattered(count: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centres = random.uniform(-10, side + 10, (count, 2))
    sides = np.exp(random.uniform(np.log(3), np.log(side / 2), (count, 2)))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    return boxes, random.integers(0, 80, count), random.uniform(0, 1, count)


def grid(side: int = 640, cells: int = 4) -> np.ndarray:
    """Boxes with room for a label above each."""
    step = side // cells
    corners = [(x * step + 20, y * step + 60) for y in range(cells) for x in range(cells)]
    return np.array([(x, y, x + step - 40, y + step - 80) for x, y in corners], dtype=np.float64)


@pytest.mark.parametrize("seed", range(4))
def test_the_input_is_never_changed(seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    boxes, labels, scores = scattered(30, 200, seed)
    before = [entry.copy() for entry in (image, boxes, labels, scores)]
    picture = draw_boxes(image, boxes, labels, scores, NAMES)
    assert not np.array_equal(picture, image)
    for entry, copy in zip((image, boxes, labels, scores), before, strict=True):
        assert np.array_equal(entry, copy)


def test_without_boxes_the_picture_is_an_equal_copy() -> None:
    image = background(50, 70)
    picture = draw_boxes(image, np.zeros((0, 4)), np.zeros(0), None, NAMES)
    assert np.array_equal(picture, image)
    assert not np.shares_memory(picture, image)


@pytest.mark.parametrize("box", [(100, 100, 300, 250), (0, 0, 90, 90), (550, 580, 640, 640), (40, 300, 46, 306)])
def test_outside_a_box_only_its_label_changes_and_that_is_a_rectangle(box: tuple[int, int, int, int]) -> None:
    picture = draw_boxes(background(640, 640), [box], [7], [0.5], NAMES)
    changed = (picture != background(640, 640)).any(axis=2)
    frame = np.zeros_like(changed)
    frame[box[1] : box[3], box[0] : box[2]] = True
    rows, columns = np.nonzero(changed & ~frame)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    assert (changed | frame)[top:bottom, left:right].all()
    assert bottom - top < 40
    for y, x in ((top, left), (top, right - 1), (bottom - 1, left), (bottom - 1, right - 1)):
        assert tuple(picture[y, x]) == class_colour(7)


def test_every_border_has_its_class_colour_and_what_it_frames_stays() -> None:
    boxes = grid()
    labels = np.arange(len(boxes)) * 5
    picture = draw_boxes(background(640, 640), boxes, labels, None, NAMES)
    for (left, top, right, bottom), label in zip(boxes.astype(int), labels, strict=True):
        colour = np.array(class_colour(int(label)))
        for edge in (picture[bottom - 1, left:right], picture[top, left:right], picture[top:bottom, left]):
            assert (edge == colour).all()
        assert (picture[top:bottom, right - 1] == colour).all()
        inside = picture[top + 3 : bottom - 3, left + 3 : right - 3]
        assert np.array_equal(inside, background(*inside.shape[:2]))


def test_the_order_of_the_boxes_does_not_matter() -> None:
    boxes, labels, scores = scattered(60, 320, 1)
    turn = np.random.default_rng(2).permutation(len(boxes))
    picture = draw_boxes(background(320, 320), boxes, labels, scores, NAMES)
    assert np.array_equal(picture, draw_boxes(background(320, 320), boxes[turn], labels[turn], scores[turn], NAMES))


def test_boxes_that_cannot_be_drawn_are_passed_over() -> None:
    good = grid()[:3]
    bad = np.array([[np.nan, 0, 9, 9], [np.inf, 0, np.inf, 9], [700, 0, 800, 9], [-9, -9, -1, -1], [50, 50, 40, 60]])
    boxes = np.concatenate([bad, good])
    expected = draw_boxes(background(640, 640), good, [1, 2, 3], None, NAMES)
    picture = draw_boxes(background(640, 640), boxes, [0] * len(bad) + [1, 2, 3], None, NAMES)
    assert np.array_equal(picture, expected)


def test_an_empty_box_is_still_a_point() -> None:
    picture = draw_boxes(background(64, 64), [[20, 40, 20, 40], [63.9, 63.9, 63.9, 63.9]], [4, 4], None, NAMES)
    assert tuple(picture[40, 20]) == class_colour(4)
    assert tuple(picture[63, 63]) == class_colour(4)


def test_small_boxes_have_small_labels() -> None:
    heights = []
    for side in (12, 400):
        picture = draw_boxes(background(640, 640), [[100, 100, 100 + side, 100 + side]], [3], None, NAMES)
        heights.append(int((picture[:100] != background(100, 640)).any(axis=(1, 2)).sum()))
    assert 0 < heights[0] < heights[1]


def test_lines_grow_with_the_image() -> None:
    widths = []
    for side in (320, 640, 2000):
        box = [side * 0.2, side * 0.2, side * 0.8, side * 0.8]
        row = draw_boxes(background(side, side), [box], [3], None, NAMES)[side // 2]
        widths.append(int((row != background(1, side)[0]).any(axis=1).sum()) // 2)
    assert widths == [1, 3, 8]


def test_labels_hide_no_more_than_their_share_of_a_crowd() -> None:
    boxes, labels, scores = scattered(2000, 640, 3)
    boxes[:, 2:] = boxes[:, :2] + 4
    picture = draw_boxes(background(640, 640), boxes, labels, scores, NAMES)
    frames = 2000 * 16
    assert (picture != background(640, 640)).any(axis=2).sum() < 0.27 * 640 * 640 + frames


@pytest.mark.parametrize("shape", [(1, 1), (9, 300), (300, 5), (30, 30)])
def test_images_without_room_for_a_label(shape: tuple[int, int]) -> None:
    picture = draw_boxes(background(*shape), [[0, 0, shape[1], shape[0]]], [3], [0.5], ["a very long name " * 4] * 4)
    assert picture.shape == (*shape, 3)
    assert tuple(picture[-1, -1]) == class_colour(3)


def test_a_label_without_a_name_is_its_number() -> None:
    nameless = draw_boxes(background(200, 200), [[50, 50, 150, 150]], [3], None, [])
    assert np.array_equal(nameless, draw_boxes(background(200, 200), [[50, 50, 150, 150]], [3], None, list("0123")))


def batch(count: int = 3, side: int = 96) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    boxes = np.tile(np.array([[10, 20, 50, 60], [30, 50, 90, 90], [0, 0, 0, 0]], dtype=np.float32), (count, 1, 1))
    valid = np.tile(np.array([True, True, False]), (count, 1))
    return images, boxes, np.tile(np.array([1, 2, 0]), (count, 1)), valid


def test_a_batch_is_drawn_alike_whatever_holds_it() -> None:
    images, boxes, labels, valid = batch()
    picture = batch_picture(images, boxes, labels, valid, NAMES, columns=2)
    tensors = [torch.from_numpy(entry) for entry in (images.transpose(0, 3, 1, 2).copy(), boxes, labels, valid)]
    channels_last = tensors[0].to(memory_format=torch.channels_last)
    assert np.array_equal(picture, batch_picture(*tensors, NAMES, columns=2))
    assert np.array_equal(picture, batch_picture(channels_last, *tensors[1:], NAMES, columns=2))


def test_a_batch_shows_the_first_images_and_only_valid_boxes() -> None:
    images, boxes, labels, valid = batch(5)
    picture = batch_picture(images, boxes, labels, valid, NAMES, columns=2, most=4)
    assert np.array_equal(picture, batch_picture(images[:4], boxes[:4], labels[:4], valid[:4], NAMES, columns=2))
    assert np.array_equal(
        picture, batch_picture(images, boxes[:, :2], labels[:, :2], valid[:, :2], NAMES, columns=2, most=4)
    )
    fewer = valid.copy()
    fewer[0, 1] = False
    assert not np.array_equal(picture, batch_picture(images, boxes, labels, fewer, NAMES, columns=2, most=4))


def test_each_cell_is_the_image_with_its_boxes() -> None:
    images, boxes, labels, valid = batch(2, side=512)
    picture = batch_picture(images, boxes, labels, valid, NAMES, columns=2)
    for b in range(2):
        cell = draw_boxes(images[b], boxes[b, :2], labels[b, :2], None, NAMES)
        left = 6 + b * 518
        assert np.array_equal(picture[6:518, left : left + 512], cell)


def test_an_empty_batch_is_a_white_page() -> None:
    page = batch_picture(
        np.zeros((0, 3, 64, 64), np.uint8), np.zeros((0, 1, 4)), np.zeros((0, 1)), np.zeros((0, 1)), []
    )
    assert (page == 255).all()


def test_weak_predictions_and_those_beyond_the_count_are_left_out() -> None:
    images, boxes, labels, valid = batch()
    scores = np.tile(np.array([0.9, 0.1, 0.8]), (3, 1))
    one = np.full(3, 1)
    shown = truth_and_prediction_picture(images, boxes, labels, valid, boxes, scores, labels, one * 2, NAMES)
    counted = truth_and_prediction_picture(images, boxes, labels, valid, boxes, scores, labels, one, NAMES)
    assert np.array_equal(shown, counted)
    all_shown = truth_and_prediction_picture(
        images, boxes, labels, valid, boxes, scores, labels, one * 2, NAMES, least_score=0.05
    )
    assert not np.array_equal(shown, all_shown)


def test_truth_stands_left_of_its_prediction() -> None:
    images, boxes, labels, valid = batch(1, side=512)
    nothing = np.zeros((1, 0))
    picture = truth_and_prediction_picture(
        images, boxes, labels, valid, np.zeros((1, 0, 4)), nothing, nothing, np.zeros(1), NAMES, captions=["street.jpg"]
    )
    truth = draw_boxes(images[0], boxes[0, :2], labels[0, :2], None, NAMES)
    bottom = picture.shape[0] - 6
    assert np.array_equal(picture[bottom - 512 : bottom, 6:518], truth)
    assert np.array_equal(picture[bottom - 512 : bottom, -518:-6], images[0])


def test_a_png_comes_back_as_it_was(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    save_picture(tmp_path / "deep" / "picture.png", image)
    assert np.array_equal(cv2.imread(str(tmp_path / "deep" / "picture.png"))[..., ::-1], image)


def test_a_jpeg_comes_back_nearly_as_it_was(tmp_path: Path) -> None:
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[..., 0], image[..., 1] = 200, np.arange(60) * 2
    save_picture(tmp_path / "picture.JPG", image)
    back = cv2.imread(str(tmp_path / "picture.JPG"))[..., ::-1]
    assert np.abs(back.astype(int) - image).max() < 8


def test_pictures_that_cannot_be_written_are_the_users_to_mend(tmp_path: Path) -> None:
    image = background(8, 8)
    with pytest.raises(UserError, match=r"\.jpg or \.png"):
        save_picture(tmp_path / "picture.webm", image)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"):
        save_picture(tmp_path / "file" / "picture.png", image)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
