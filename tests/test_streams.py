"""Streams of CUDA, on a stand-in that hands out as few as torch has."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import pytest
import torch

from paceline.data.device.lanes import CudaLane
from paceline.models.operations import beside
from paceline.streams import stream_for
from paceline.training.apart import Apart
from paceline.training.graphed import CudaCapture

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE = torch.device("cuda", 0)
MOST = 32
"""Streams of a priority that torch hands out, one after the other, before it begins anew."""


@pytest.fixture
def handed_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    numbers = {0: count(), -1: count()}
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: (priority, next(numbers[priority]) % MOST))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    stream_for.cache_clear()
    yield
    stream_for.cache_clear()


@pytest.mark.usefixtures("handed_out")
def test_no_run_of_a_process_gets_a_stream_that_somebody_else_has() -> None:
    """Above all, evaluations beside a training never go by one that a recording uses."""
    recorded = {beside._stream_of(DEVICE, number) for number in (-1, beside.OF_STATISTICS, beside.ASIDE, *range(6))}
    for _ in range(2 * MOST):
        evaluation = Apart(lambda network, stops: None, device=DEVICE, alone=True)._stream
        others = {CudaLane(DEVICE)._stream, CudaCapture(DEVICE)._stream}
        assert len(recorded | others | {evaluation}) == 9 + 3
