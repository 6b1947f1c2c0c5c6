"""Decoding on a CUDA device by nvImageCodec against the host's decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from encoded import jpeg, pixels_of, smooth, write_set

from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.device.choice import choose_training_data, renderer_of
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


def open_stream(folder: Path) -> TrainLoader:
    """Return a loader that keeps no decoded images: 150 JPEG files, and what no codec takes, in windows."""
    pytest.importorskip("nvidia.nvimgcodec")
    write_set(folder)
    for number, (height, width) in enumerate(np.random.default_rng(0).integers(200, 640, (150, 2)).tolist()):
        (folder / "images" / f"many{number:03d}.jpg").write_bytes(jpeg(smooth(100 + number, height, width)))
        (folder / "labels" / f"many{number:03d}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    config = DataConfig(data=str(folder), imgsz=320, batch=16, workers=4, cache="none")
    index = open_data_set(config, seed=0, splits=("train",)).train
    assert index is not None
    return TrainLoader(index, config, AugmentConfig(partners="window"), seed=3, on_device=True)


@pytest.mark.parametrize("kept", [None, 0], ids=["window", "nothing kept"])
def test_streamed_pictures_are_the_hosts(kept: int | None, tmp_path: Path) -> None:
    """Each of them, beside a device that is never idle: memory that is used too early would show a wrong tile.

    With nothing kept, images are decoded into memory that was drawn from a batch ago, and again and again.
    """
    with open_stream(tmp_path) as loader:
        by_host = DeviceLoader(loader, DEVICE, torch.float32, renderer_of(DEVICE))
        expected = [(batch.samples, batch.images) for epoch in (0, 1) for batch in by_host.epoch(epoch, mosaic=True)]
        loader.num_recent = loader.num_recent if kept is None else kept
        codec = NvImageCodec(DEVICE, 4)
        drawn = DeviceLoader(loader, DEVICE, torch.float32, renderer_of(DEVICE), codec=codec)
        before, load = loader.stats()["decodes"], torch.ones(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
        pictures = []
        for epoch in (0, 1):
            for batch in drawn.epoch(epoch, mosaic=True):
                for _ in range(20):
                    load = load @ load / 4096
                pictures.append((batch.samples, batch.images))
        assert len(pictures) == len(expected) > 20
        for (samples, images), (other_samples, other_images) in zip(pictures, expected, strict=True):
            assert torch.equal(samples, other_samples)
            assert (images - other_images).abs().mean(dim=(1, 2, 3)).max() < 3 / 255
        decodes = loader.stats()["decodes"] - before
        assert decodes <= 1.05 * len(loader.index) if kept is None else decodes > 4 * len(loader.index)


def test_who_decodes_and_draws_what_streams_is_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_stream(tmp_path) as loader, caplog.at_level("INFO", "paceline"):
        chosen = choose_training_data(loader, "auto", DEVICE, torch.bfloat16, upload=False)
        assert "decode=auto: the host decodes" in caplog.text
        assert "render=auto: the host draws" in caplog.text
        forced = choose_training_data(loader, "auto", DEVICE, torch.bfloat16, upload=False, decode="device")
        assert isinstance(forced, DeviceLoader)
        assert forced.decodes
        for source in (chosen, forced):
            assert sum(len(batch) for batch in source.epoch(0, mosaic=True)) >= len(loader.index)
