from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
import torch

from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.device import choice
from paceline.data.device.choice import choose_training_data, renderer_of
from paceline.data.device.loader import DeviceLoader
from paceline.data.device.reference import render_reference
from paceline.data.loader import TrainLoader
from paceline.errors import UserError

CPU = torch.device("cpu")


def open_loader(cache: str = "none", **augment: object) -> TrainLoader:
    config = DataConfig(data="shapes", imgsz=96, batch=8, workers=2, cache=cache, fraction=0.1)  # type: ignore[arg-type]
    index = open_data_set(config, seed=0).train
    return TrainLoader(index, config, AugmentConfig(**augment), seed=3, on_device=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("cache", ["none", "ram", "device"])
@pytest.mark.parametrize(
    "augment",
    [{}, {"degrees": 20.0}, {"mixup": 0.4, "cutmix": 0.8, "perspective": 0.001, "greyscale": 0.3, "bgr": 0.3}],
    ids=["aligned", "turned", "mixed"],
)
def test_batches_are_those_of_the_host(cache: str, augment: dict[str, float]) -> None:
    """The same samples and targets to the bit, and pictures within a mean of 2/255, in two epochs."""
    with open_loader("none", **augment) as host, open_loader(cache, **augment) as packing:
        drawn = DeviceLoader(packing, CPU, torch.float32, render_reference, upload=cache == "device")
        assert drawn.steps(0) == host.steps(0)
        count = 0
        for epoch in (0, 1):
            for expected, batch in zip(host.epoch(epoch, mosaic=True), drawn.epoch(epoch, mosaic=True), strict=True):
                for name in ("boxes", "labels", "valid", "samples", "original_hw"):
                    assert torch.equal(getattr(batch, name), getattr(expected, name))
                difference = (batch.network_input() - expected.network_input()).abs().mean() * 255
                assert difference < 2
                count += 1
        assert count >= 4
        assert drawn.stats()["broken"] == 0


def test_any_step_can_be_the_first() -> None:
    with open_loader() as loader:
        drawn = DeviceLoader(loader, CPU, torch.float32, render_reference)
        whole = [batch.images for batch in drawn.epoch(0, mosaic=True)]
        (last,) = [batch.images for batch in drawn.epoch(0, mosaic=True, start_step=len(whole) - 1)]
        assert torch.equal(last, whole[-1])


def test_stopping_early_stops_the_threads() -> None:
    before = threading.active_count()
    with open_loader() as loader:
        stream = DeviceLoader(loader, CPU, torch.float32, render_reference).epoch(0, mosaic=True)
        next(stream)
        stream.close()
    assert threading.active_count() == before


def test_broken_images_are_replaced_as_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    from paceline.data.images import BrokenImage, Images

    whole = Images.get

    def get(self, number, *, renew=False):
        if number == 2:
            raise BrokenImage(number, "is gone")
        return whole(self, number, renew=renew)

    monkeypatch.setattr(Images, "get", get)
    with open_loader() as host, open_loader() as packing:
        drawn = DeviceLoader(packing, CPU, torch.float32, render_reference)
        seen = set()
        for expected, batch in zip(host.epoch(0, mosaic=True), drawn.epoch(0, mosaic=True), strict=True):
            seen.update(batch.samples.tolist())
            assert torch.equal(batch.samples, expected.samples)
            assert torch.equal(batch.boxes, expected.boxes)
        assert 2 not in seen
        assert drawn.stats()["broken"] == 1


def test_the_choice_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    with open_loader() as loader, caplog.at_level(logging.INFO, "paceline"):
        for render in ("auto", "host"):
            assert choose_training_data(loader, render, CPU, torch.float32, upload=False) is loader
        drawn = choose_training_data(loader, "device", CPU, torch.float32, upload=False)
        assert isinstance(drawn, DeviceLoader)
        assert drawn.host is loader
        assert "slow reference" in caplog.text
        with pytest.raises(UserError, match="cache=device needs render=device"):
            choose_training_data(loader, "host", CPU, torch.float32, upload=True)


@pytest.mark.parametrize("faster", ["host", "device"])
def test_the_faster_one_is_chosen_and_named(
    faster: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is one that a host's picture moves by one second, or by three; a device's by two."""
    now = [0.0]

    class Renderer:
        def __call__(self, sources, masks, table, size, dtype):
            now[0] += 2
            return render_reference(sources, masks, table, size, dtype)

    with open_loader() as loader, caplog.at_level(logging.INFO, "paceline"):
        drawn = DeviceLoader(loader, CPU, torch.float32, Renderer())
        host_epoch = loader.epoch

        def slower(epoch, *, mosaic):
            for batch in host_epoch(epoch, mosaic=mosaic):
                now[0] += 1 if faster == "host" else 3
                yield batch

        monkeypatch.setattr(loader, "epoch", slower)
        monkeypatch.setattr(choice.time, "perf_counter", lambda: now[0])
        chosen = choice._faster(loader, drawn, CPU, lambda: None)
        assert chosen is (loader if faster == "host" else drawn)
        assert "render=auto: the host draws" in caplog.text


def test_without_triton_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "paceline.data.device.kernel", None)
    with pytest.raises(UserError, match="needs Triton"):
        renderer_of(torch.device("cuda"))


def test_pictures_are_as_many_as_asked_for() -> None:
    with open_loader() as loader:
        drawn = DeviceLoader(loader, CPU, torch.float32, render_reference)
        assert drawn.batch_size == 8
        assert all(np.isfinite(batch.images.numpy()).all() for batch in drawn.epoch(0, mosaic=False))
