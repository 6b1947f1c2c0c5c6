import dataclasses

import pytest
import torch

from paceline.batch import Batch


@pytest.fixture
def batch() -> Batch:
    images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8).to(memory_format=torch.channels_last)
    return Batch(
        images=images,
        boxes=torch.zeros(2, 32, 4),
        labels=torch.zeros(2, 32, dtype=torch.int64),
        valid=torch.zeros(2, 32, dtype=torch.bool),
        samples=torch.tensor([7, -1]),
        original_hw=torch.tensor([[480, 640], [1, 1]]),
    )


def test_length_and_size(batch):
    assert len(batch) == 2
    assert batch.size_hw == (64, 96)


def test_to_moves_every_tensor_and_changes_nothing_else(batch):
    moved = batch.to("meta", non_blocking=True)
    for field in dataclasses.fields(Batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        assert after.device.type == "meta"
        assert (after.shape, after.dtype, after.stride()) == (before.shape, before.dtype, before.stride())
    assert batch.images.device.type == "cpu"


def test_a_batch_cannot_be_changed(batch):
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.images = batch.images
