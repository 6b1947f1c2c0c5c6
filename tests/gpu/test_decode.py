"""Decoding on a CUDA device by nvImageCodec against the host's decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from encoded import pixels_of, write_set

from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.device.choice import renderer_of
from paceline.data.device.codec import NvImageCodec
from paceline.data.device.decoding import choose_codec
from paceline.data.device.loader import DeviceLoader
from paceline.data.device.resident import decoded
from paceline.data.loader import TrainLoader

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")


def open_loader(folder: Path) -> TrainLoader:
    pytest.importorskip("nvidia.nvimgcodec")
    write_set(folder)
    config = DataConfig(data=str(folder), imgsz=64, batch=4, workers=4, cache="device")
    index = open_data_set(config, seed=0).train
    assert index is not None
    return TrainLoader(index, config, AugmentConfig(), seed=3, on_device=True)


def test_the_set_is_nearly_the_hosts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The two JPEG decoders round in other places: a mean of 1/255 per image is allowed, 2/255 where it is reduced."""
    with open_loader(tmp_path) as loader, caplog.at_level("INFO", "paceline"):
        images = decoded(loader, NvImageCodec(DEVICE, 4), DEVICE)
        assert images.pixels.is_cuda
        assert f"decoded 20 of {len(loader.index)} images" in caplog.text
        for number, reduction in enumerate(loader.images.reductions.tolist()):
            found, expected = pixels_of(images, number), loader.images.get(number)
            assert found.shape == expected.shape
            assert np.abs(found.astype(int) - expected).mean() < (1 if reduction == 1 else 2)


def test_batches_are_drawn_from_it_and_the_choice_is_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_loader(tmp_path) as loader, caplog.at_level("INFO", "paceline"):
        choose_codec(loader, "auto", DEVICE)
        assert "decode=auto: the host decodes" in caplog.text
        codec = choose_codec(loader, "device", DEVICE)
        drawn = DeviceLoader(loader, DEVICE, torch.float32, renderer_of(DEVICE), upload=True, codec=codec)
        for batch, expected in zip(drawn.epoch(0, mosaic=True), loader.epoch(0, mosaic=True), strict=True):
            assert torch.equal(batch.samples.cpu(), expected.samples)
            assert (batch.images.cpu() - expected.network_input()).abs().mean() < 3 / 255
