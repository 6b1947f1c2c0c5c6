"""Drawing on a CUDA device: the kernel against the reference, and the way of whole batches."""

from __future__ import annotations

import pytest
import torch
from pictures import KINDS, draw, make_sources, make_transforms, mixed

from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.device.choice import renderer_of
from paceline.data.device.loader import DeviceLoader
from paceline.data.loader import TrainLoader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [75, 320, 640])
def test_the_kernel_is_the_reference(kind: str, size: int) -> None:
    kernel = renderer_of(torch.device("cuda"))
    transforms, sources = mixed(make_transforms(KINDS[kind], 16, size)), make_sources(grey=True)
    drawn = draw(transforms, sources, kernel, device="cuda").cpu()
    expected = draw(transforms, sources)
    assert ((drawn - expected).abs() * 255 > 1).double().mean() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smaller_types_are_rounded_once(dtype: torch.dtype) -> None:
    kernel = renderer_of(torch.device("cuda"))
    transforms, sources = make_transforms(KINDS["aligned"], 8, 160), make_sources()
    exact = draw(transforms, sources, kernel, device="cuda")
    rounded = draw(transforms, sources, kernel, dtype=dtype, device="cuda")
    assert rounded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(rounded, exact.to(dtype))


@pytest.mark.parametrize("cache", ["none", "ram", "device"])
def test_batches_arrive_whole_while_the_device_is_busy(cache: str) -> None:
    """Steps that take longer than the loader let buffers be taken again early, if they ever are."""
    device = torch.device("cuda")
    config = DataConfig(data="shapes", imgsz=160, batch=8, workers=4, cache=cache, fraction=0.25)  # type: ignore[arg-type]
    index = open_data_set(config, seed=0).train
    with TrainLoader(index, config, AugmentConfig(), seed=1, on_device=True) as loader:
        drawn = DeviceLoader(loader, device, torch.float32, renderer_of(device), upload=cache == "device")
        heavy = torch.randn(4096, 4096, device=device)
        kept = []
        for epoch in (0, 1):
            for batch in drawn.epoch(epoch, mosaic=True):
                heavy = heavy @ heavy.T / 4096
                kept.append((batch.samples.clone(), batch.images.clone()))
        torch.cuda.synchronize()
        host = [batch for epoch in (0, 1) for batch in loader.epoch(epoch, mosaic=True)]
        assert len(kept) == len(host) > 4
        for (samples, images), expected in zip(kept, host, strict=True):
            assert torch.equal(samples.cpu(), expected.samples)
            assert (images.cpu() - expected.network_input()).abs().mean() < 2 / 255
