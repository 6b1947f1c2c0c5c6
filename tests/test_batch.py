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


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_level_of_grey_becomes_the_number_that_float32_gives_rounded(batch, dtype):
    levels = torch.arange(256, dtype=torch.uint8).expand(2, 3, 64, 256).contiguous(memory_format=torch.channels_last)
    found = dataclasses.replace(batch, images=levels).network_input(dtype)
    expected = (levels.float() / 255).to(dtype or torch.float32)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_what_lies_in_0_to_1_already_is_not_divided_again(batch):
    drawn = dataclasses.replace(batch, images=torch.rand(2, 3, 64, 96).bfloat16())
    assert drawn.network_input() is drawn.images
    assert drawn.network_input(torch.bfloat16) is drawn.images
    assert torch.equal(drawn.network_input(torch.float32), drawn.images.float())
