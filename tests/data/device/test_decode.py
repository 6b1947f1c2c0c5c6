"""Decoding on the device: a codec on the CPU that is told what to refuse, against the host's decoder."""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from encoded import FakeCodec, files, jpeg, pixels_of, smooth, write_set

from paceline.data import decode as on_host
from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.device import decoding
from paceline.data.device.choice import choose_training_data
from paceline.data.device.codec import NvImageCodec
from paceline.data.device.decode import averaged, batches, planes_of, turned
from paceline.data.device.decoding import choose_codec, faster_on_device
from paceline.data.device.loader import DeviceLoader
from paceline.data.device.reference import render_reference
from paceline.data.device.resident import DeviceImages, decoded
from paceline.data.loader import TrainLoader
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IMGSZ = 64


@pytest.fixture
def open_loader(tmp_path: Path) -> Callable[..., TrainLoader]:
    """Return a function that opens a loader of the files, for `cache=device` unless said otherwise."""
    write_set(tmp_path)

    def opened(cache: str = "device") -> TrainLoader:
        config = DataConfig(data=str(tmp_path), imgsz=IMGSZ, batch=4, workers=2, cache=cache)  # type: ignore[arg-type]
        index = open_data_set(config, seed=0).train
        return TrainLoader(index, config, AugmentConfig(), seed=3, on_device=True)

    return opened


def require_the_hosts(images: DeviceImages, loader: TrainLoader) -> None:
    """All images as the host has them: the same unless they are reduced, and then within a mean of 1/255."""
    reduced = 0
    for number, reduction in enumerate(loader.images.reductions.tolist()):
        found, expected = pixels_of(images, number), loader.images.get(number)
        assert found.shape == expected.shape
        difference = np.abs(found.astype(int) - expected).mean()
        assert difference == 0 if reduction == 1 else difference < 1
        reduced += reduction > 1
    assert reduced >= 9


def test_the_set_is_the_hosts(open_loader: Callable[..., TrainLoader]) -> None:
    with open_loader() as loader:
        codec = FakeCodec()
        images = decoded(loader, codec, CPU)
        assert sorted(codec.calls) == [(2, 1), (18, 3)]
        assert loader.stats()["decodes"] == len(loader.index)
        sizes = images.heights.astype(np.int64) * images.widths * images.planes
        np.testing.assert_array_equal(images.offsets, np.cumsum(sizes) - sizes)
        require_the_hosts(images, loader)


def refuses_some(place: int, pixels: Tensor) -> Tensor | None:
    return None if place % 3 == 0 else pixels


def refuses_all(place: int, pixels: Tensor) -> Tensor | None:
    return None


def other_size(place: int, pixels: Tensor) -> Tensor | None:
    return pixels[:-1]


def other_type(place: int, pixels: Tensor) -> Tensor | None:
    return pixels.to(torch.int16)


def fails(place: int, pixels: Tensor) -> Tensor | None:
    raise RuntimeError("codec out of order")


@pytest.mark.parametrize("spoil", [refuses_some, refuses_all, other_size, other_type, fails])
def test_what_the_codec_cannot_do_the_host_does(
    spoil: Callable[[int, Tensor], Tensor | None],
    open_loader: Callable[..., TrainLoader],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_loader() as loader, caplog.at_level(logging.INFO, "paceline"):
        images = decoded(loader, FakeCodec(spoil), CPU)
        require_the_hosts(images, loader)
        num = 13 if spoil is refuses_some else 0
        assert f"cpu decoded {num} of {len(loader.index)} images" in caplog.text
        assert caplog.text.count("codec out of order") == (spoil is fails)


@pytest.mark.parametrize("how", ["gone", "cut off", "another size"])
@pytest.mark.parametrize("name", ["small3.jpg", "plain.png"])
def test_broken_images_are_the_loaders_faults(
    how: str, name: str, open_loader: Callable[..., TrainLoader], tmp_path: Path
) -> None:
    with open_loader() as loader:
        (broken,) = [row for row, path in enumerate(loader.index.paths) if path.endswith(name)]
        whole = [batch.samples.numpy() for batch in loader.epoch(0, mosaic=False)]
    with open_loader() as loader:
        path = tmp_path / "images" / name
        if how == "gone":
            path.unlink()
        elif how == "cut off":
            path.write_bytes(path.read_bytes()[:-900])
        else:
            path.write_bytes(files()["large.jpg"])
        drawn = DeviceLoader(loader, CPU, torch.float32, render_reference, upload=True, codec=FakeCodec())
        assert len(loader.faults) == 1
        assert broken in np.concatenate(whole)
        for samples, batch in zip(whole, drawn.epoch(0, mosaic=True), strict=True):
            np.testing.assert_array_equal(batch.samples, np.where(samples == broken, broken + 1, samples))


def test_batches_are_those_of_the_uploaded_set(open_loader: Callable[..., TrainLoader]) -> None:
    """The same samples and targets; pictures within what the reduction rounds."""
    with open_loader() as one, open_loader() as other:
        by_host = DeviceLoader(one, CPU, torch.float32, render_reference, upload=True)
        by_codec = DeviceLoader(other, CPU, torch.float32, render_reference, upload=True, codec=FakeCodec())
        count = 0
        for expected, batch in zip(by_host.epoch(0, mosaic=True), by_codec.epoch(0, mosaic=True), strict=True):
            for name in ("boxes", "labels", "valid", "samples", "original_hw"):
                assert torch.equal(getattr(batch, name), getattr(expected, name))
            assert (batch.images - expected.images).abs().mean() * 255 < 1
            count += 1
        assert count >= 5


def test_nothing_is_kept_on_the_host(open_loader: Callable[..., TrainLoader]) -> None:
    with open_loader() as loader:
        decoded(loader, FakeCodec(), CPU)
        assert loader.images.decoded_set().heights.sum() == 0


def test_a_set_without_colour_takes_a_third(open_loader: Callable[..., TrainLoader], tmp_path: Path) -> None:
    for name in files():
        path = tmp_path / "images" / name
        if name.startswith("grey"):
            continue
        path.unlink()
    with open_loader() as loader:
        images = decoded(loader, FakeCodec(), CPU)
        assert images.planes.tolist() == [1, 1]
        assert images.pixels.untyped_storage().nbytes() == (images.heights * images.widths).sum()


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1), (1, 9, 3)])
def test_turning_is_the_hosts(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    for orientation in range(1, 9):
        found = turned(torch.from_numpy(pixels), orientation).numpy()
        np.testing.assert_array_equal(found, on_host._turn(pixels, orientation))


@pytest.mark.parametrize("shape", [(64, 32), (61, 33, 3), (7, 1), (1, 8, 3), (16, 16)])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_averages_are_means_of_their_blocks(shape: tuple[int, ...], reduction: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = averaged(torch.from_numpy(pixels), reduction).numpy()
    height, width = -(-shape[0] // reduction), -(-shape[1] // reduction)
    fill = [(0, height * reduction - shape[0]), (0, width * reduction - shape[1])] + [(0, 0)] * (len(shape) - 2)
    padded = np.pad(pixels, fill, mode="edge").astype(float)
    blocks = padded.reshape(height, reduction, width, reduction, *shape[2:]).mean(axis=(1, 3))
    assert found.shape == blocks.shape
    assert np.abs(found - blocks).max() <= 0.5


def test_what_may_go_to_a_codec() -> None:
    kinds = files()
    planes = {name: planes_of(content) for name, content in kinds.items()}
    assert {name for name, count in planes.items() if count == 0} == {"inks.jpg", "plain.png", "bits.png"}
    assert {name for name, count in planes.items() if count == 1} == {"grey.jpg", "grey_turned.jpg"}
    whole = kinds["large.jpg"]
    assert planes_of(jpeg(smooth(0, 40, 40), keep_rgb=True)) == 0
    for odd in (b"", b"\xff\xd8", whole[:-2], whole[:20] + b"\xff\xd9", b"<html>"):
        assert planes_of(odd) == 0


def test_batches_hold_all_images_in_order_and_no_more_than_they_may() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(1, 4000, (1000, 2))
    sizes[10:300] = 8
    sizes[500] = 30000
    numbers = random.permutation(1000)
    made = batches(numbers, sizes[numbers])
    assert [number for batch in made for number in batch] == numbers.tolist()
    assert max(len(batch) for batch in made) <= 128
    assert all(3 * sizes[batch].prod(axis=1).sum() <= 256 << 20 for batch in made if len(batch) > 1)
    assert [500] in made
    assert batches(np.arange(290), sizes[10:300]) == [[*range(128)], [*range(128, 256)], [*range(256, 290)]]
    assert batches(np.arange(0), sizes[:0]) == []


@pytest.mark.parametrize(("sharing", "faster"), [(1, "device"), (3, "host")])
def test_the_faster_one_is_chosen_and_named(
    sharing: int,
    faster: str,
    open_loader: Callable[..., TrainLoader],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The clock is one that the host's decoder moves by 3 ms per image, the codec by 1 ms."""
    now, turn = [0.0], threading.Lock()

    def move(seconds: float) -> None:
        with turn:
            now[0] += seconds

    def tick(place: int, pixels: Tensor) -> Tensor:
        move(0.001)
        return pixels

    with open_loader() as loader, caplog.at_level(logging.INFO, "paceline"):
        whole = loader.images.decoded

        def slower(number: int, encoded: bytes) -> Any:
            move(0.003)
            return whole(number, encoded)

        monkeypatch.setattr(loader.images, "decoded", slower)
        monkeypatch.setattr(decoding.time, "perf_counter", lambda: now[0])
        settled: list[float] = []
        chosen = faster_on_device(loader, FakeCodec(tick), CPU, lambda: settled.append(now[0]), sharing)
        assert chosen == (faster == "device")
        assert len(settled) == 4
        count = len(loader.index)
        rates = 1000 * sharing / 3, 1000 * count / (3 * 3 + (count - 3))
        assert f"the host decodes {rates[0]:,.0f} images/s" in caplog.text
        assert f"cpu decodes {rates[1]:,.0f}: {'cpu' if faster == 'device' else 'the host'} does it" in caplog.text
        assert len(loader.faults) == 0


def test_a_device_that_decodes_nothing_is_never_chosen(
    open_loader: Callable[..., TrainLoader], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both timings are of the host's decoder then, and by this clock the second one is always shorter."""
    now = iter(1.0 - 0.5**turn for turn in range(1000))

    def refuse(place: int, pixels: Tensor) -> Tensor:
        raise RuntimeError("no decoder")

    with open_loader() as loader, caplog.at_level(logging.INFO, "paceline"):
        monkeypatch.setattr(decoding.time, "perf_counter", lambda: next(now))
        assert not faster_on_device(loader, FakeCodec(refuse), CPU, lambda: None)
    assert f"cpu takes 0 of {len(loader.index)} files" in caplog.text


def test_the_choice_without_a_gpu(open_loader: Callable[..., TrainLoader]) -> None:
    def never(device: torch.device, num_threads: int) -> FakeCodec:
        raise AssertionError

    with open_loader() as loader:
        assert choose_codec(loader, "auto", CPU, make=never) is None
        assert choose_codec(loader, "host", CUDA, make=never) is None
        with pytest.raises(UserError, match="needs a CUDA device"):
            choose_codec(loader, "device", CPU, make=never)
        with pytest.raises(UserError, match="add cache=device"):
            choose_training_data(loader, "device", CPU, torch.float32, upload=False, decode="device")
        with pytest.raises(UserError, match="needs a CUDA device"):
            choose_training_data(loader, "device", CPU, torch.float32, upload=True, decode="device")
        drawn = choose_training_data(loader, "device", CPU, torch.float32, upload=True)
        assert isinstance(drawn, DeviceLoader)


@pytest.mark.parametrize(
    ("free", "measured", "agreed", "chosen"),
    [
        (1 << 40, True, True, True),
        (1 << 40, True, False, False),
        (1 << 40, False, True, True),
        (10, True, False, False),
    ],
)
def test_the_ranks_agree_on_the_choice(
    free: int,
    measured: bool,
    agreed: bool,
    chosen: bool,
    open_loader: Callable[..., TrainLoader],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    codec, told, given_back = FakeCodec(), [], []
    monkeypatch.setattr(decoding, "give_back", given_back.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(decoding, "faster_on_device", lambda *_: measured)

    def agree(mine: bool) -> bool:
        told.append(mine)
        return agreed

    with open_loader() as loader, caplog.at_level(logging.INFO, "paceline"):
        found = choose_codec(loader, "auto", CUDA, agree=agree, make=lambda device, num_threads: codec)
        assert found is (codec if chosen else None)
        assert told == [measured and free > 10]
        assert ("the host decodes, for cuda may need" in caplog.text) == (free == 10)
        assert given_back == ([] if chosen else [CUDA])
        assert choose_codec(loader, "device", CUDA, make=lambda device, num_threads: codec) is codec


def test_without_the_package(
    open_loader: Callable[..., TrainLoader], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Asked for, it is missed; not asked for, the host decodes, and the other ranks do not wait for this one's word."""
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    told = []
    with open_loader() as loader, caplog.at_level(logging.INFO, "paceline"):
        with pytest.raises(UserError, match=r"pip install 'paceline\[gpu-decode\]'"):
            choose_codec(loader, "device", CUDA)
        assert choose_codec(loader, "auto", CUDA, agree=lambda mine: told.append(mine) or True) is None
        assert told == [False]
        assert "decode=auto: the host decodes" in caplog.text


def fake_nvimgcodec(decode: Callable[..., list[Any]], made: list[dict[str, Any]]) -> SimpleNamespace:
    def decoder(**options: Any) -> SimpleNamespace:
        made.append(options)
        return SimpleNamespace(decode=decode)

    return SimpleNamespace(
        BackendKind=SimpleNamespace(HW_GPU_ONLY="hardware", GPU_ONLY="gpu", HYBRID_CPU_GPU="hybrid", CPU_ONLY="cpu"),
        Backend=lambda kind: kind,
        ColorSpec=SimpleNamespace(SRGB="rgb", GRAY="grey"),
        DecodeParams=lambda **options: options,
        Decoder=decoder,
    )


def test_how_nvimagecodec_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images are given by DLPack, HW3 or HW1, and are read in the current stream; it turns nothing by itself."""
    asked, made = [], []

    def decode(encoded: list[bytes], *, params: dict[str, Any], cuda_stream: int) -> list[Any]:
        asked.append((params, cuda_stream))
        planes = 3 if params["color_spec"] == "rgb" else 1
        return [
            None if file == b"odd" else torch.full((2, 4, planes), len(file), dtype=torch.uint8) for file in encoded
        ]

    module = fake_nvimgcodec(decode, made)
    monkeypatch.setitem(sys.modules, "nvidia", SimpleNamespace(nvimgcodec=module))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    codec = NvImageCodec(CUDA, 3)
    assert made[0]["device_id"] == 1
    assert made[0]["max_num_cpu_threads"] == 2, "with as many as there are cores, it warns"
    assert made[0]["backends"] == ["hardware", "gpu", "hybrid"]
    coloured, refused = codec.decode([b"12345", b"odd"], 3)
    (grey,) = codec.decode([b"123"], 1)
    assert refused is None
    assert coloured is not None
    assert coloured.shape == (2, 4, 3)
    assert (coloured == 5).all()
    assert grey is not None
    assert grey.shape == (2, 4)
    assert [(params["color_spec"], stream) for params, stream in asked] == [("rgb", 77), ("grey", 77)]
    assert not any(params["apply_exif_orientation"] for params, _ in asked)


def test_a_driver_that_is_too_old_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_nvimgcodec(list, [])

    def refuse(**options: Any) -> None:
        raise RuntimeError("CUDA Runtime failure: '#35'")

    module.Decoder = refuse
    monkeypatch.setitem(sys.modules, "nvidia", SimpleNamespace(nvimgcodec=module))
    with pytest.raises(UserError, match=r"'#35'.*update the driver"):
        NvImageCodec(torch.device("cuda", 0), 1)


def test_images_of_a_codec_are_kept_until_work_with_them_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder may write at once into what was given back, so nothing is given back before an event has passed.

    The device is one that does nothing until somebody waits. Work with the images of a call is started before the next.
    """
    out: list[tuple[int, weakref.ref[Any]]] = []  # images by their call
    waited: list[int] = []
    kinds: list[int] = []
    calls = [0]

    def decode(encoded: list[bytes], *, params: dict[str, Any], cuda_stream: int) -> list[Any]:
        calls[0] += 1
        planes = 3 if params["color_spec"] == "rgb" else 1
        given_back = [call for call, image in out if image() is None]
        assert given_back == waited, "an event that was recorded in the call after it has been waited for"
        assert sum(call not in given_back and of == planes for (call, _), of in zip(out, kinds, strict=True)) <= 1
        image = np.zeros((2, 2, planes), np.uint8)
        out.append((calls[0], weakref.ref(image)))
        kinds.append(planes)
        return [image]

    class Event:
        def __init__(self) -> None:
            self.behind = calls[0]

        def synchronize(self) -> None:
            waited.append(self.behind)

    module = fake_nvimgcodec(decode, [])
    monkeypatch.setitem(sys.modules, "nvidia", SimpleNamespace(nvimgcodec=module))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77, record_event=Event))
    codec = NvImageCodec(CUDA, 1)
    for _ in range(6):
        codec.decode([b"coloured"], 3)
    assert waited == [1, 2, 3, 4], "images of one call are out while the next one decodes, not more"
    for _ in range(3):
        codec.decode([b"grey"], 1)
    assert waited == [1, 2, 3, 4, 7]
