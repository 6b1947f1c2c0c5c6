from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data.targets import bucket, padded


def test_buckets_are_few_and_endless() -> None:
    wanted = [0, 1, 32, 33, 64, 65, 128, 129, 300, 301, 600, 601, 5000]
    assert [bucket(number) for number in wanted] == [32, 32, 32, 64, 64, 128, 128, 300, 300, 600, 600, 1200, 9600]


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 90), min_size=1, max_size=6))
def test_padding_keeps_every_box_in_order(counts: list[int]) -> None:
    pictures = np.repeat(np.arange(len(counts)), counts)
    boxes = np.random.default_rng(0).random((len(pictures), 4))
    labels = np.arange(len(pictures), dtype=np.int32)
    boxes_BG4, labels_BG, valid_BG = padded(pictures, boxes, labels, len(counts))
    assert valid_BG.sum(axis=1).tolist() == counts
    np.testing.assert_array_equal(labels_BG[valid_BG], labels)
    np.testing.assert_array_equal(boxes_BG4[valid_BG], boxes.astype(np.float32))
    assert not boxes_BG4[~valid_BG].any()
    assert valid_BG.shape[1] == bucket(max(counts))
