"""`batch=auto` against meters whose devices are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import UserError
from paceline.training.auto_batch import SAME_SPEED, Choice, Line, Trial, choose, round_down

GB = 1_000_000_000


@dataclass(kw_only=True)
class Device:
    """A device of which everything is known; notes the sizes that are tried."""

    fixed_bytes: int = GB
    image_bytes: int = GB // 4
    block_bytes: int = 1
    """The allocator takes whole blocks."""
    fails_above: float = math.inf
    fastest_at: float = math.inf
    """Images from which on no time is gained."""
    overhead_s: float = 0.1
    tried: list[int] = field(default_factory=list)

    def bytes_of(self, images: int) -> int:
        return -(-(self.fixed_bytes + images * self.image_bytes) // self.block_bytes) * self.block_bytes

    def __call__(self, images: int) -> Trial | None:
        self.tried.append(images)
        if images > self.fails_above:
            return None
        seconds = 0.01 * images + self.overhead_s * max(images / self.fastest_at, 1)
        return Trial(images=images, peak_bytes=self.bytes_of(images), seconds=seconds)


def find(device: Device, *, room: int = 20 * GB, most: int = 10_000, usual: int = 16) -> Choice:
    return choose(device, room_bytes=room, most=most, usual=usual)


def test_the_largest_that_fits_where_more_is_faster() -> None:
    device = Device(overhead_s=10)
    choice = find(device)
    assert choice.images == 64  # 76 would fit, and 64 is the sensible size below
    assert choice.limit == "memory"
    assert device.tried == [2, 4, 16, 32, 64]
    assert device.bytes_of(choice.images) <= 20 * GB


def test_sizes_that_cost_seconds_each_are_begun_further_up() -> None:
    device = Device(overhead_s=10)
    assert choose(device, room_bytes=20 * GB, most=1000, usual=16, first=8).images == 64
    assert device.tried == [8, 16, 32, 64]
    narrow = Device(overhead_s=10, fails_above=3)
    assert choose(narrow, room_bytes=20 * GB, most=1000, usual=16, first=8).images == 3
    assert narrow.tried[:3] == [8, 4, 2]


def test_the_fastest_where_more_is_no_faster() -> None:
    device = Device(fastest_at=32)
    choice = find(device, room=200 * GB)
    assert choice.images == 32
    assert choice.limit == "speed"
    assert max(device.tried) == 64


def test_speed_alone_never_goes_below_the_usual_size() -> None:
    device = Device(fastest_at=1)
    assert find(device).images == 16
    assert find(device, usual=8).images == 8
    assert find(device, room=3 * GB).images == 8  # but memory does


def test_the_images_of_the_set_are_all_there_are() -> None:
    device = Device(overhead_s=10)
    assert find(device, most=11) == find(Device(overhead_s=10), most=11)
    choice = find(device, most=11)
    assert (choice.images, choice.limit) == (11, "images")
    assert find(Device(), most=1).images == 1
    assert max(device.tried) == 11


@pytest.mark.parametrize("fails_above", [2, 3, 5, 15, 16, 20, 33, 47, 63, 64])
def test_an_answer_that_fails_is_followed_by_a_smaller_one(fails_above: int) -> None:
    """The line knows nothing of this limit."""
    device = Device(overhead_s=10, fails_above=fails_above)
    choice = find(device)
    assert fails_above / 2 < choice.images <= fails_above
    assert choice.limit == "memory"
    assert len(device.tried) <= 9


@pytest.mark.parametrize("fails_above", [0, 1])
def test_down_to_one_image(fails_above: int) -> None:
    device = Device(fails_above=fails_above)
    if fails_above == 1:
        assert find(device).images == 1
    else:
        with pytest.raises(UserError, match="not even one image fits"):
            find(device)
    assert set(device.tried) == {2, 1}


def test_a_try_that_took_more_than_its_room_counts_as_failed() -> None:
    """Memory is there, but others were promised it."""
    device = Device(overhead_s=10)
    assert find(device, room=int(1.5 * GB)).images == 2
    with pytest.raises(UserError, match="raise memory="):
        find(device, room=GB)


def test_an_allocator_that_takes_whole_blocks() -> None:
    device = Device(overhead_s=10, image_bytes=GB // 10, block_bytes=2 * GB)
    choice = find(device)
    assert choice.line is not None
    assert all(choice.line.fixed_bytes + t.images * choice.line.image_bytes >= t.peak_bytes for t in choice.trials)
    assert device.bytes_of(choice.images) <= 20 * GB
    assert choice.images >= 96


def test_a_search_that_is_late_ends_at_the_usual_size() -> None:
    device = Device(overhead_s=10)
    choice = choose(device, room_bytes=20 * GB, most=1000, usual=16, is_late=lambda: True)
    assert (choice.images, choice.limit) == (16, "time")


@given(
    fixed=st.integers(0, 8 * GB),
    image=st.integers(1000, 4 * GB),
    block=st.sampled_from([1, 20_000_000, GB]),
    fails_above=st.one_of(st.just(math.inf), st.integers(1, 300)),
    fastest_at=st.one_of(st.just(math.inf), st.integers(1, 300)),
    most=st.integers(1, 500),
    usual=st.integers(1, 16),
)
def test_what_always_holds(
    fixed: int, image: int, block: int, fails_above: float, fastest_at: float, most: int, usual: int
) -> None:
    """The answer was tried, fits, is no larger than the set, and no eligible try was much faster."""
    device = Device(
        fixed_bytes=fixed, image_bytes=image, block_bytes=block, fails_above=fails_above, fastest_at=fastest_at
    )
    room = 20 * GB
    try:
        choice = find(device, room=room, most=most, usual=usual)
    except UserError:
        assert device.bytes_of(1) > room
        return
    assert choice.images in device.tried
    assert choice.images <= min(most, fails_above)
    assert device.bytes_of(choice.images) <= room
    assert len(device.tried) <= 16
    assert len(set(device.tried)) == len(device.tried)
    by_images = {trial.images: trial for trial in choice.trials}
    largest = max(by_images)
    for trial in choice.trials:
        if trial.images >= min(usual, largest):
            assert by_images[choice.images].images_per_s * SAME_SPEED >= trial.images_per_s


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 10**11)), min_size=2, max_size=5, unique_by=lambda t: t[0])
)
def test_no_try_lies_above_the_line(points: list[tuple[int, int]]) -> None:
    trials = [Trial(images=images, peak_bytes=size, seconds=1) for images, size in points]
    line = Line.through(trials)
    for trial in trials:
        assert line.fixed_bytes + line.image_bytes * trial.images >= trial.peak_bytes * (1 - 1e-9)
    assert line.image_bytes >= 0
    room = 5e10
    if line.image_bytes > 0 and line.images_in(room) > 0:
        assert line.fixed_bytes + line.image_bytes * line.images_in(room) <= room * (1 + 1e-9)


def test_exact_points_give_their_line() -> None:
    trials = [Trial(images=images, peak_bytes=100 + 7 * images, seconds=1) for images in (2, 4, 16)]
    line = Line.through(trials)
    assert (line.fixed_bytes, line.image_bytes) == pytest.approx((100, 7))
    assert line.images_in(100 + 7 * 30) in (29, 30)
    assert line.images_in(50) == 0
    assert Line(fixed_bytes=1, image_bytes=0).images_in(2) > 10**8


@given(st.integers(1, 10_000))
def test_rounding_takes_little_away(images: int) -> None:
    rounded = round_down(images)
    assert 1 <= rounded <= images
    assert rounded > 0.66 * images
    assert round_down(rounded) == rounded
