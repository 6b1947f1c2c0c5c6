"""Faults: what takes the place of broken images, beside a walk from each to the next, one step at a time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

from paceline.data.faults import Faults
from paceline.errors import UserError

if TYPE_CHECKING:
    from paceline.data.index import Index


class Numbered:
    """As much of an index as faults look at."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def path(self, number: int) -> str:
        return f"{number}.jpg"


def broken_ones(length: int, broken: list[int]) -> Faults:
    """Name images broken one by one, more than are tolerated too."""
    faults = Faults(cast("Index", Numbered(length)))
    for number in broken:
        try:
            assert faults.add(number, "is gone")
        except UserError:
            assert len(faults) > max(1, length // 100)
    return faults


def walked(image: int, length: int, broken: list[int]) -> int:
    while image in broken:
        image = (image + 1) % length
    return image


@pytest.mark.parametrize("seed", range(30))
def test_the_next_whole_image_takes_the_place(seed: int) -> None:
    """Few, many, and all but one broken, in any order; runs that go on at the first image."""
    random = np.random.default_rng(seed)
    length = int(random.integers(2, 40))
    broken = random.permutation(length)[: random.integers(1, length)].tolist()
    faults = broken_ones(length, broken)
    images = random.integers(0, length, (7, 4))
    before = images.copy()
    expected = [[walked(image, length, broken) for image in row] for row in images.tolist()]
    assert faults.replace(images).tolist() == expected
    assert np.array_equal(images, before)


def test_the_last_image_is_followed_by_the_first() -> None:
    faults = broken_ones(5, [4, 0])
    assert faults.replace(np.arange(5)).tolist() == [1, 1, 2, 3, 1]


def test_where_nothing_is_whole_the_run_ends() -> None:
    with pytest.raises(UserError, match="3 of 3 images"):
        broken_ones(3, [0, 1, 2]).replace(np.arange(3))


def test_broken_images_in_a_row_cost_no_more_than_scattered_ones() -> None:
    images = np.random.default_rng(0).integers(0, 100_000, (64, 4))
    images[0, 0] = 0  # the first of the row
    row, scattered = (broken_ones(100_000, list(range(0, 900 * step, step))) for step in (1, 100))
    took: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(15):
        for which, faults in enumerate((row, scattered)):
            start = time.thread_time()
            for _ in range(10):
                faults.replace(images)
            took[which].append(time.thread_time() - start)
    assert np.median(took[0]) < 10 * np.median(took[1])
