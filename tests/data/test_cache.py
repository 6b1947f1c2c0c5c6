from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.data.cache import RecentCache, SlabCache
from paceline.data.slab import Slab

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray


def image(number: int) -> NDArray[np.uint8]:
    return np.full((2, 2), number, np.uint8)


def recording(made: list[int], number: int) -> Callable[[], NDArray[np.uint8]]:
    def make() -> NDArray[np.uint8]:
        made.append(number)
        return image(number)

    return make


@pytest.mark.parametrize("kind", ["recent", "slab"])
def test_each_image_is_made_once_for_all_threads(kind: str) -> None:
    cache = RecentCache(100) if kind == "recent" else SlabCache(Slab(50, 50 * 64), RecentCache(0), what="images")
    made: list[int] = []
    barrier = threading.Barrier(4)

    def worker(start: int) -> list[int]:
        barrier.wait()
        return [int(cache.get(number, recording(made, number))[0, 0]) for number in range(50)]

    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(worker, range(4)))
    assert seen == [list(range(50))] * 4
    assert sorted(made) == list(range(50))


def test_what_came_first_goes_first() -> None:
    cache, made = RecentCache(3), list[int]()
    for number in (0, 1, 2, 0, 3, 0, 3, 2):
        cache.get(number, recording(made, number))
    assert made == [0, 1, 2, 3, 0]
    assert len(cache) == 3


def test_what_is_renewed_goes_last() -> None:
    cache, made = RecentCache(3), list[int]()
    for number, renew in ((0, True), (1, True), (2, True), (0, True), (3, True), (0, False), (1, False)):
        cache.get(number, recording(made, number), renew=renew)
    assert made == [0, 1, 2, 3, 1]


def test_nothing_is_kept_without_room() -> None:
    cache, made = RecentCache(0), list[int]()
    for _ in range(3):
        cache.get(1, recording(made, 1))
    assert made == [1, 1, 1]
    assert len(cache) == 0


@pytest.mark.parametrize("kind", ["recent", "slab"])
def test_an_error_reaches_everyone_and_leaves_nothing(kind: str) -> None:
    cache = RecentCache(3) if kind == "recent" else SlabCache(Slab(3, 1000), RecentCache(0), what="images")

    def fail() -> NDArray[np.uint8]:
        raise ValueError("broken")

    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            cache.get(0, fail)
    assert cache.get(0, lambda: image(7))[0, 0] == 7
    assert cache.get(0, fail)[0, 0] == 7


def test_users_of_one_slab_make_each_image_once_between_them(tmp_path: Path) -> None:
    made: list[int] = []
    caches = [
        SlabCache(Slab.open(tmp_path / "a.slab", 60, 60 * 64, kept=False), RecentCache(0), what="images")
        for _ in range(3)
    ]

    def use(user: int) -> bool:
        order = np.random.default_rng(user // 2).permutation(60).tolist()
        return all(caches[user % 3].get(number, recording(made, number))[0, 0] == number for number in order)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(use, range(6)))
    assert sorted(made) == list(range(60))
    for cache in caches:
        cache.slab.close()


def test_a_full_slab_is_named_once_and_costs_only_what_has_no_room(caplog: pytest.LogCaptureFixture) -> None:
    cache, made = SlabCache(Slab(10, 4 * 64), RecentCache(2), what="images for a test"), list[int]()
    with caplog.at_level(logging.WARNING, "paceline"):
        for number in [*range(10), *range(10)]:
            assert cache.get(number, recording(made, number))[0, 0] == number
    assert sorted(set(made)) == list(range(10))
    assert [made.count(number) for number in range(4)] == [1] * 4
    assert caplog.text.count("images for a test is full") == 1


def test_another_state_of_the_source_is_made_again(tmp_path: Path) -> None:
    made: list[int] = []
    for state in (1, 1, 2, 2):
        slab = Slab.open(tmp_path / "a.slab", 3, 1000, kept=True)
        cache = SlabCache(slab, RecentCache(0), what="images", stamp={1: state}.__getitem__)
        assert cache.get(1, recording(made, state))[0, 0] == state
        slab.close()
    assert made == [1, 2]


@pytest.mark.parametrize("kind", ["recent", "slab"])
def test_what_is_kept_for_a_while_is_forgotten(kind: str) -> None:
    """What is being made at that moment comes to whoever waits for it."""
    recent: RecentCache[NDArray[np.uint8]] = RecentCache(5)
    cache, made = recent if kind == "recent" else SlabCache(Slab(10, 0), recent, what="images"), list[int]()
    for number in range(3):
        cache.get(number, recording(made, number))
    assert len(recent) == 3

    def make_while_it_forgets() -> NDArray[np.uint8]:
        cache.forget()
        return image(7)

    np.testing.assert_array_equal(cache.get(7, make_while_it_forgets), image(7))
    assert len(recent) == 1
    np.testing.assert_array_equal(cache.get(1, recording(made, 1)), image(1))
    assert made == [0, 1, 2, 1]
