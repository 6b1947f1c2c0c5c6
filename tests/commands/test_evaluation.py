"""Evaluating a network: figures are of all images, or there are none."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from paceline.commands.evaluation import evaluate_network
from paceline.data.config import DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.loader import EvalLoader
from paceline.data.shapes import ShapesConfig, ensure
from paceline.evaluation.config import PostprocessConfig
from paceline.models.registry import build_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from paceline.batch import Batch
    from paceline.commands.evaluation import Batches
    from paceline.data.index import Index
    from paceline.evaluation.evaluator import Evaluation


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Seven images, in four batches of two."""
    data = ensure(tmp_path, ShapesConfig(train=2, val=7))
    found = open_data_set(DataConfig(data=str(data)), seed=0).val
    assert found is not None
    return found


@dataclass(frozen=True)
class Cut:
    """Batches of which only the first come, as after a loader's early end."""

    whole: EvalLoader
    count: int

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[Batch]:
        for _, batch in zip(range(self.count), self.whole, strict=False):
            yield batch


def evaluated(batches: Batches, index: Index, stops: Callable[[], bool] = lambda: False) -> Evaluation | None:
    torch.manual_seed(0)
    network = build_model("yolov8n", len(index.names)).eval()
    config, device = PostprocessConfig(max_det=5), torch.device("cpu")
    return evaluate_network(network, batches, index, config, device=device, amp_dtype=None, stops=stops)


@pytest.mark.parametrize("count", range(4))
def test_a_part_is_never_scored(index: Index, count: int) -> None:
    with EvalLoader(index, 32, 2, 1) as batches:
        with pytest.raises(RuntimeError, match=f"all but {4 - count} of its 4 batches"):
            evaluated(Cut(batches, count), index)
        whole = evaluated(Cut(batches, 4), index)
    assert whole is not None
    assert sorted(whole.detections.seen) == list(range(7))


@pytest.mark.parametrize("count", [0, 2, 3])
def test_who_stops_scores_nothing(index: Index, count: int) -> None:
    asked = iter(range(10))
    with EvalLoader(index, 32, 2, 1) as batches:
        assert evaluated(batches, index, lambda: next(asked) >= count) is None


def test_an_error_or_an_interrupt_on_the_way_is_raised(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    with EvalLoader(index, 32, 2, 1) as batches:
        for error in (KeyboardInterrupt(), MemoryError("no memory")):

            def fail(number: int, *, renew: bool = False, error: BaseException = error) -> None:
                if number >= 4:
                    raise error

            monkeypatch.setattr(batches.images, "get", fail)
            with pytest.raises(type(error)):
                evaluated(batches, index)


def test_the_log_says_what_becomes_of_a_broken_image(index: Index, caplog: pytest.LogCaptureFixture) -> None:
    index.path(3).unlink()
    with caplog.at_level(logging.WARNING, "paceline"), EvalLoader(index, 32, 2, 1) as batches:
        found = evaluated(batches, index)
    assert found is not None
    assert found.record.num_images == 7
    assert 3 not in found.detections.seen
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].endswith("nothing is found in it, so its objects count as missed")
