"""Raw images: pixels there and back, for every shape, and nothing else taken for one."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data.decode import decode, decode_compact
from paceline.data.headers import BadImage
from paceline.data.raw import HEADER_BYTES, from_raw, is_raw, to_raw


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.booleans(), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32 - 1))
def test_pixels_come_back(height: int, width: int, grey: bool, reduction: int, seed: int) -> None:
    shape = (height, width) if grey else (height, width, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    content = to_raw(pixels, reduction)
    found, reduced = from_raw(content)
    assert is_raw(content)
    assert len(content) == HEADER_BYTES + pixels.size
    assert reduced == reduction
    assert np.array_equal(found, pixels)
    assert np.array_equal(decode_compact(content, 6, reduction), pixels), "raw images are upright already"


def test_the_file_is_one_that_others_read() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    encoded, ppm = cv2.imencode(".ppm", pixels[..., ::-1])
    assert encoded
    assert to_raw(pixels)[HEADER_BYTES:] == ppm.tobytes()[-pixels.size :]


def test_a_raw_image_is_reduced_further_by_the_law_of_others() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)
    encoded, png = cv2.imencode(".png", pixels[..., ::-1])
    assert encoded
    assert np.array_equal(decode(to_raw(pixels), 1, 4), decode(png.tobytes(), 1, 4))
    with pytest.raises(BadImage, match="reduced by 4"):
        decode_compact(to_raw(pixels, 4), 1, 2)


@pytest.mark.parametrize("cut", [1, HEADER_BYTES - 30, HEADER_BYTES + 5])
def test_a_cut_off_image_is_bad(cut: int) -> None:
    content = to_raw(np.zeros((8, 8, 3), np.uint8))[:-cut]
    with pytest.raises(BadImage):
        from_raw(content)
    with pytest.raises(BadImage):
        from_raw(b"P6\n# paceline" + bytes(100))
