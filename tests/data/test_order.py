from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data.order import NUM_STRIPES, Order, rows_of_rank

SIZES = {"num_samples": st.integers(1, 60), "batch": st.integers(1, 40), "seed": st.integers(0, 2**40)}


@settings(max_examples=60, deadline=None)
@given(**SIZES, num_passes=st.integers(1, 5))
def test_each_pass_brings_every_sample_once_in_full_batches(
    num_samples: int, batch: int, seed: int, num_passes: int
) -> None:
    order = Order(num_samples, batch, seed)
    steps = order.steps_until_pass(num_passes)
    batches = [order.batch(step) for step in range(steps)]
    assert all(len(samples) == batch for samples, _ in batches)
    samples = np.concatenate([samples for samples, _ in batches])
    passes = np.concatenate([passes for _, passes in batches])
    for number in range(num_passes):
        np.testing.assert_array_equal(np.sort(samples[passes == number]), np.arange(num_samples))
    assert (np.diff(passes) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(**SIZES, step=st.integers(0, 10**6))
def test_any_step_is_found_without_walking_there(num_samples: int, batch: int, seed: int, step: int) -> None:
    walked = Order(num_samples, batch, seed)
    for earlier in range(max(step - 3, 0), step):
        walked.batch(earlier)
    for ours, fresh in zip(walked.batch(step), Order(num_samples, batch, seed).batch(step), strict=True):
        np.testing.assert_array_equal(ours, fresh)


@settings(max_examples=60, deadline=None)
@given(**SIZES, epoch=st.integers(0, 20))
def test_an_epoch_ends_with_the_batch_that_completes_its_pass(
    num_samples: int, batch: int, seed: int, epoch: int
) -> None:
    order = Order(num_samples, batch, seed)
    end = order.steps_until_pass(epoch + 1)
    assert end * batch >= (epoch + 1) * num_samples > (end - 1) * batch


def test_the_stream_does_not_depend_on_the_batch() -> None:
    streams = [
        np.concatenate([Order(7, batch, 3).batch(step)[0] for step in range(60 // batch)]) for batch in (1, 4, 20)
    ]
    np.testing.assert_array_equal(streams[0], streams[1])
    np.testing.assert_array_equal(streams[0], streams[2])


def test_recent_samples_lie_in_the_window_of_their_stripe() -> None:
    order = Order(50, 8, 0)
    positions = np.arange(20 * NUM_STRIPES)
    draws = np.random.default_rng(0).random((len(positions), 3))
    recent = order.recent(positions, draws, 5)
    stream = order.at(np.arange(30 * NUM_STRIPES))[0]
    for position in positions:
        turn, stripe = divmod(int(position), NUM_STRIPES)
        window = [stream[at * NUM_STRIPES + stripe] for at in range(max(turn - 5, 0), max(turn - 5, 0) + 5)]
        assert set(recent[position]) <= set(window)


def test_a_window_is_used_evenly() -> None:
    order = Order(10_000, 8, 0)
    positions = np.full(20_000, 40 * NUM_STRIPES)
    draws = np.random.default_rng(0).random((20_000, 7))
    for column in order.recent(positions, draws, 16).T:
        counts = np.unique(column, return_counts=True)[1]
        assert len(counts) == 16
        assert np.abs(counts - 1250).max() < 5 * np.sqrt(1250)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 16])
def test_nobody_is_picked_twice_while_there_are_others(window: int) -> None:
    order = Order(10_000, 8, 0)
    positions = np.full(500, 40 * NUM_STRIPES)
    picked = order.recent(positions, np.random.default_rng(0).random((500, 7)), window)
    for first in range(0, 7, window):
        deal = np.sort(picked[:, first : first + window], axis=1)
        assert (np.diff(deal, axis=1) > 0).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 200))
def test_ranks_share_every_batch(data: st.DataObject, batch: int) -> None:
    world = data.draw(st.integers(1, batch))
    parts = [rows_of_rank(batch, rank, world) for rank in range(world)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(batch))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(max_examples=60, deadline=None)
@given(power=st.integers(0, 6), factor=st.integers(1, 5), step=st.integers(0, 10**6))
def test_ranks_that_divide_the_stripes_own_them(power: int, factor: int, step: int) -> None:
    world = 2**power
    order = Order(1000, world * factor, 0)
    for rank in range(world):
        stripes = order.positions(step)[rows_of_rank(world * factor, rank, world)] % NUM_STRIPES
        assert (stripes % world == rank).all()
