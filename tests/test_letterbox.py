import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.letterbox import Letterbox

sides = st.integers(1, 5000)
canvases = st.integers(1, 40).map(lambda n: 32 * n)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(height=sides, width=sides, canvas_height=canvases, canvas_width=canvases)
def test_the_image_fills_the_canvas_one_way_and_is_centred(height, width, canvas_height, canvas_width):
    box = Letterbox.fit(height, width, canvas_height, canvas_width)
    assert 1 <= box.scaled_height <= canvas_height
    assert 1 <= box.scaled_width <= canvas_width
    assert box.scaled_height == canvas_height or box.scaled_width == canvas_width
    below = canvas_height - box.scaled_height - box.top
    right = canvas_width - box.scaled_width - box.left
    assert box.top <= below <= box.top + 1
    assert box.left <= right <= box.left + 1
    scale = min(canvas_height / height, canvas_width / width)
    assert abs(box.scaled_height - max(height * scale, 1)) <= 0.5 + 1e-9
    assert abs(box.scaled_width - max(width * scale, 1)) <= 0.5 + 1e-9


@settings(max_examples=200, deadline=None, derandomize=True)
@given(height=sides, width=sides, canvas_height=canvases, canvas_width=canvases, seed=st.integers(0, 99))
def test_inverse_undoes_forward(height, width, canvas_height, canvas_width, seed):
    box = Letterbox.fit(height, width, canvas_height, canvas_width)
    corners = np.random.default_rng(seed).random((6, 2, 2)) * [width, height]
    boxes = np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1)
    np.testing.assert_allclose(box.inverse(box.forward(boxes)), boxes, rtol=1e-9, atol=1e-9)


def test_the_whole_image_maps_to_its_pixels_in_the_canvas():
    box = Letterbox.fit(480, 640, 320, 320)
    assert (box.scaled_height, box.scaled_width, box.top, box.left) == (240, 320, 40, 0)
    np.testing.assert_array_equal(box.forward(np.array([[0.0, 0.0, 640.0, 480.0]])), [[0, 40, 320, 280]])
    np.testing.assert_array_equal(box.inverse(np.array([[160.0, 160.0, 320.0, 280.0]])), [[320, 240, 640, 480]])


def test_small_images_are_enlarged():
    box = Letterbox.fit(50, 25, 200, 200)
    assert (box.scaled_height, box.scaled_width, box.scale_x, box.scale_y) == (200, 100, 4, 4)


def test_scales_are_those_of_the_whole_pixels():
    box = Letterbox.fit(333, 1000, 320, 320)
    assert box.scaled_height == 107
    assert box.scale_y == pytest.approx(107 / 333)
    assert box.scale_x == pytest.approx(0.32)


def test_inverse_clips_what_lies_in_the_margin():
    box = Letterbox.fit(480, 640, 320, 320)
    np.testing.assert_array_equal(box.inverse(np.array([[-5.0, 0.0, 400.0, 320.0]])), [[0, 0, 640, 480]])


def test_no_boxes_stay_no_boxes():
    box = Letterbox.fit(480, 640, 320, 320)
    assert box.forward(np.zeros((0, 4))).shape == (0, 4)
    assert box.inverse(np.zeros((0, 4), dtype=np.float32)).dtype == np.float64
