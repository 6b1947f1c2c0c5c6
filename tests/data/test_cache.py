from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.data import cache
from paceline.data.cache import ImageCache, choose_capacity, decoded_bytes, free_memory_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray


def image(number: int) -> NDArray[np.uint8]:
    return np.full((2, 2), number, np.uint8)


def test_each_image_is_made_once_for_all_threads() -> None:
    images, made, barrier = ImageCache(100), [], threading.Barrier(4)

    def make(number: int) -> NDArray[np.uint8]:
        made.append(number)
        return image(number)

    def worker(start: int) -> list[int]:
        barrier.wait()
        return [int(images.get(number, lambda: make(number))[0][0, 0]) for number in range(50)]  # noqa: B023

    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(worker, range(4)))
    assert seen == [list(range(50))] * 4
    assert sorted(made) == list(range(50))


def test_what_came_first_goes_first() -> None:
    images = ImageCache(3)
    found = [images.get(number, lambda: image(0))[1] for number in (0, 1, 2, 0, 3, 0, 3, 2)]
    assert found == [False, False, False, True, False, False, True, True]
    assert len(images) == 3


def test_nothing_is_kept_without_room() -> None:
    images = ImageCache(0)
    assert [images.get(1, lambda: image(1))[1] for _ in range(3)] == [False] * 3
    assert len(images) == 0


def test_an_error_reaches_everyone_and_leaves_nothing() -> None:
    images = ImageCache(3)

    def fail() -> NDArray[np.uint8]:
        raise ValueError("broken")

    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            images.get(0, fail)
    assert images.get(0, lambda: image(7))[0][0, 0] == 7


def test_bytes_are_those_of_reduced_colour_images() -> None:
    assert decoded_bytes(np.array([[10, 20], [11, 21]]), np.array([1, 2])) == 3 * (10 * 20 + 6 * 11)


@pytest.mark.parametrize(
    ("choice", "needed", "expected"), [("auto", 400, 9), ("auto", 600, 2), ("none", 1, 2), ("ram", 10**6, 9)]
)
def test_auto_keeps_what_fits_in_half_of_the_free_memory(
    choice: str, needed: int, expected: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "free_memory_bytes", lambda: 1000)
    with caplog.at_level(logging.INFO, "paceline"):
        assert choose_capacity(choice, 9, needed, otherwise=2, what="training") == expected  # type: ignore[arg-type]
    assert f"cache={choice}: 9 images for training" in caplog.text


def test_free_memory_is_some() -> None:
    assert 2**20 < free_memory_bytes() < 2**50
