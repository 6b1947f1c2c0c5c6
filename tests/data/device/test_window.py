"""Images that are decoded on the device as batches need them: a codec on the CPU, against the host's decoder."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from encoded import FakeCodec, files, write_many, write_set

from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.device import choice, decoding
from paceline.data.device import loader as loading
from paceline.data.device.choice import choose_training_data
from paceline.data.device.lanes import HostLane
from paceline.data.device.loader import DeviceLoader
from paceline.data.device.reference import render_reference
from paceline.data.device.window import DeviceWindow, window_bytes
from paceline.data.loader import TrainLoader
from paceline.data.order import rows_of_rank
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from paceline.batch import Batch
    from paceline.data.images import Images

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TARGETS = ("boxes", "labels", "valid", "samples", "original_hw")


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def opened(folder: Path, rank: int = 0, world: int = 1, *, batch: int = 4, imgsz: int = 64, **more: Any) -> TrainLoader:
    """Return a loader that keeps no decoded images; `more` are further options, of data or augmentation."""
    data = {name: more.pop(name) for name in ("cache", "workers") if name in more}
    config = DataConfig(data=str(folder), imgsz=imgsz, batch=batch, **{"cache": "none", "workers": 2, **data})
    index = open_data_set(config, seed=0, splits=("train",)).train
    return TrainLoader(index, config, AugmentConfig(**more), seed=3, rank=rank, world=world, on_device=True)


def drawn(loader: TrainLoader, codec: FakeCodec | None = None) -> DeviceLoader:
    return DeviceLoader(loader, CPU, torch.float32, render_reference, codec=codec)


def draw_nothing(sources: Tensor, masks: Tensor, table: Any, size: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(len(table.starts), 3, 1, 1, dtype=dtype)


def window_of(device_loader: DeviceLoader) -> DeviceWindow:
    assert device_loader._window is not None
    return device_loader._window


def collected(device_loader: DeviceLoader, epochs: int = 1) -> list[Batch]:
    return [batch for epoch in range(epochs) for batch in device_loader.epoch(epoch, mosaic=True)]


def require_same(batches: Sequence[Batch], expected: Sequence[Batch], most: float = 0.0) -> None:
    """The same samples and targets; pictures within a mean of `most` of 255 steps, the same bits where that is 0."""
    assert len(batches) == len(expected) > 0
    for batch, other in zip(batches, expected, strict=True):
        assert all(torch.equal(getattr(batch, name), getattr(other, name)) for name in TARGETS)
        if most:
            assert (batch.images - other.images).abs().mean() * 255 < most
        else:
            assert torch.equal(batch.images, other.images)


@pytest.mark.parametrize("partners", ["all", "window"])
@pytest.mark.parametrize("more", [{}, {"degrees": 20.0, "mixup": 0.5, "cutmix": 0.5}], ids=["aligned", "mixed"])
def test_pictures_are_those_of_the_hosts_decoder(tmp_path: Path, partners: str, more: dict[str, float]) -> None:
    """To the bit, where the codec is the host's decoder in other clothes, in two epochs."""
    write_many(tmp_path, 70)
    with opened(tmp_path, partners=partners, **more) as host, opened(tmp_path, partners=partners, **more) as streaming:
        codec = FakeCodec()
        require_same(collected(drawn(streaming, codec), 2), collected(drawn(host), 2))
        assert codec.calls
        assert streaming.stats()["broken"] == 0


@pytest.mark.parametrize("partners", ["all", "window"])
def test_every_kind_of_file(tmp_path: Path, partners: str) -> None:
    """Turned, reduced, without colour, and what no codec takes; reduced ones are means here, and nearly so there."""
    write_set(tmp_path)
    with opened(tmp_path, partners=partners) as host, opened(tmp_path, partners=partners) as streaming:
        device_loader = drawn(streaming, FakeCodec())
        require_same(collected(device_loader, 2), collected(drawn(host), 2), most=1)
        assert window_of(device_loader)._decoder.num_on_device >= 18


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_parts_of_all_ranks_are_the_batch_of_one(tmp_path: Path, world: int) -> None:
    write_many(tmp_path, 40)
    with opened(tmp_path, batch=12, partners="window") as one:
        expected = collected(drawn(one, FakeCodec()))
    for rank in range(world):
        rows = torch.from_numpy(rows_of_rank(12, rank, world))
        with opened(tmp_path, rank, world, batch=12, partners="window") as loader:
            for batch, whole in zip(collected(drawn(loader, FakeCodec())), expected, strict=True):
                assert torch.equal(batch.images, whole.images[rows])
                assert torch.equal(batch.samples, whole.samples[rows])


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_with_windows_each_image_is_read_and_decoded_about_once_per_pass(
    tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the host, and no more than it would keep lie on the device, in memory that was made before."""
    write_many(tmp_path, 3000)
    decodes, reads, lock = 0.0, [0], threading.Lock()
    for rank in range(world):
        with opened(tmp_path, rank, world, batch=16, partners="window") as loader:
            read = loader.images.shelf.store.read

            def counted(number: int, read: Callable[[int], bytes] = read) -> bytes:
                with lock:
                    reads[0] += 1
                return read(number)

            monkeypatch.setattr(loader.images.shelf.store, "read", counted)
            device_loader = DeviceLoader(loader, CPU, torch.float32, draw_nothing, codec=FakeCodec())
            window = window_of(device_loader)
            address, most = window.pixels.data_ptr(), 0
            for epoch in (0, 1):
                for _ in device_loader.epoch(epoch, mosaic=True):
                    most = max(most, window.num_images)
            assert loader.num_recent - 70 <= most <= loader.num_recent
            assert (window.pixels.data_ptr(), window.pixels.nbytes) == (address, window_bytes(loader))
            decodes += loader.stats()["decodes"]
    assert 0.9 * 6000 <= decodes <= 1.05 * 6000
    assert 0.9 * 6000 <= reads[0] <= 1.05 * 6000


@pytest.mark.parametrize("kept", [0, 9, 30])
def test_little_room_costs_decodes_and_changes_nothing(
    tmp_path: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one batch in the worst case: images are dropped early, gaps are closed, and every picture is right."""
    write_many(tmp_path, 60)
    with opened(tmp_path) as host:
        expected = collected(drawn(host), 3)
    moved = []
    close_gaps = DeviceWindow._close_gaps
    monkeypatch.setattr(DeviceWindow, "_close_gaps", lambda self: moved.append(True) or close_gaps(self))
    with opened(tmp_path) as loader:
        loader.num_recent = kept
        if kept == 30:
            sizes = loader.index.sizes.prod(axis=1) * 3
            room = int(np.sort(sizes)[-11:].sum()) + 11 * 64  # less than is to be kept, and than a rare batch needs

            monkeypatch.setattr("paceline.data.device.window.window_bytes", lambda loader: room)
        device_loader = drawn(loader, FakeCodec())
        batches = []
        for epoch in range(3):
            for batch in device_loader.epoch(epoch, mosaic=True):
                batches.append(batch)
                assert window_of(device_loader).num_images <= max(kept, 16)
        require_same(batches, expected)
        assert loader.stats()["decodes"] > 180
        assert bool(moved) == (kept == 30)


def test_any_step_can_be_the_first(tmp_path: Path) -> None:
    write_many(tmp_path, 40)
    with opened(tmp_path, partners="window") as loader:
        device_loader = drawn(loader, FakeCodec())
        whole = collected(device_loader)
    with opened(tmp_path, partners="window") as loader:
        last = list(drawn(loader, FakeCodec()).epoch(0, mosaic=True, start_step=len(whole) - 2))
        require_same(last, whole[-2:])


@pytest.mark.parametrize("partners", ["all", "window"])
@pytest.mark.parametrize("how", ["gone", "cut off", "another size", "spoilt"])
@pytest.mark.parametrize("name", ["small3.jpg", "plain.png", "grey.jpg"])
def test_broken_images_are_replaced_as_on_the_host(
    how: str, name: str, partners: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever notices: a thread that reads or decodes, or the decoder of a file that the codec gave back."""
    write_set(tmp_path)
    loaders = [opened(tmp_path, partners=partners) for _ in range(2)]
    path = tmp_path / "images" / name
    if how == "gone":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:-900])
    elif how == "another size":
        path.write_bytes(files()["large.jpg"])
    else:
        content = path.read_bytes()
        path.write_bytes(content[:2] + b"\0" * (len(content) - 4) + content[-2:])
    with loaders[0] as host, loaders[1] as streaming:
        expected = collected(drawn(host), 3)
        caplog.clear()
        with caplog.at_level(logging.INFO, "paceline"):
            batches = collected(drawn(streaming, ForgivingCodec()), 3)
        require_same(batches, expected, most=1)
        assert list(streaming.faults._reasons) == list(host.faults._reasons)
        assert streaming.stats()["broken"] == 1
        assert caplog.text.count("the next image takes its place") == 1


class ForgivingCodec(FakeCodec):
    """Refuses what it cannot decode."""

    def decode(self, encoded: Sequence[bytes], planes: int) -> list[Tensor | None]:
        out: list[Tensor | None] = []
        for file in encoded:
            try:
                out += super().decode([file], planes)
            except Exception:  # whatever is wrong with the file
                out.append(None)
        return out


def test_too_many_broken_images_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that only their decoding shows, with the list of them."""
    write_many(tmp_path, 30)
    with opened(tmp_path) as loader:
        for number in (3, 11, 17):
            path = tmp_path / "images" / f"{number:05d}.jpg"
            path.write_bytes((tmp_path / "images" / f"{(number + 1):05d}.jpg").read_bytes())
        with pytest.raises(UserError, match=r"2 of 30 images cannot be read any more"):
            collected(drawn(loader, FakeCodec()), 2)


def test_what_was_refused_is_decoded_by_threads_from_then_on(tmp_path: Path) -> None:
    """It is offered again only as often as it was on its way when that became known."""
    write_many(tmp_path, 24)
    asked: list[bytes] = []

    class Picky(FakeCodec):
        def decode(self, encoded: Sequence[bytes], planes: int) -> list[Tensor | None]:
            asked.extend(encoded)
            made = super().decode(encoded, planes)
            return [None if len(file) % 2 else pixels for file, pixels in zip(encoded, made, strict=True)]

    with opened(tmp_path) as host, opened(tmp_path) as loader:
        device_loader = drawn(loader, Picky())
        loader.num_recent = 0
        window_of(device_loader).files.forget()
        window_of(device_loader).files._recent.capacity = 0  # nothing is kept, so that all is asked for again and again
        require_same(collected(device_loader, 5), collected(drawn(host), 5))
        times = {len(file) % 2: [] for file in asked}
        for file in set(asked):
            times[len(file) % 2].append(asked.count(file))
        assert max(times[1]) <= 5 < min(times[0])
        assert len(window_of(device_loader).files.refused) == len(times[1])


def test_a_codec_that_fails_as_a_whole_may_be_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_many(tmp_path, 24)

    class Moody(FakeCodec):
        def decode(self, encoded: Sequence[bytes], planes: int) -> list[Tensor | None]:
            made = super().decode(encoded, planes)
            if len(self.calls) % 2:
                raise RuntimeError("out of sorts")
            return made

    with opened(tmp_path) as host, opened(tmp_path) as loader:
        device_loader = drawn(loader, Moody())
        require_same(collected(device_loader, 2), collected(drawn(host), 2))
        assert not window_of(device_loader).files.refused
        assert caplog.text.count("out of sorts") == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError("full")])
def test_an_end_in_the_middle_leaves_no_thread_and_no_half_image(tmp_path: Path, error: BaseException) -> None:
    """After it, the same loader still draws the right pictures."""
    write_many(tmp_path, 40)

    class Stopped(FakeCodec):
        def decode(self, encoded: Sequence[bytes], planes: int) -> list[Tensor | None]:
            made = super().decode(encoded, planes)
            if len(self.calls) == 4:
                raise error
            return made

    with opened(tmp_path) as host, opened(tmp_path) as loader:
        device_loader = drawn(loader, Stopped())
        with pytest.raises(type(error) if isinstance(error, BaseException) else error):
            collected(device_loader)
        require_same(collected(device_loader), collected(drawn(host)))
        with closing(device_loader.epoch(1, mosaic=True)) as stream:
            next(stream)


def test_all_of_it_happens_in_the_lane_in_the_order_of_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is made, filled and drawn from in one lane, by the consumer's thread: nothing else keeps it apart."""
    write_many(tmp_path, 40)
    events: list[str] = []

    class Lane(HostLane):
        depth = 0

        @contextmanager
        def _inside(self) -> Iterator[None]:
            self.depth += 1
            yield
            self.depth -= 1

        def working(self) -> Any:
            return self._inside()

    lane = Lane()

    def note(what: str) -> None:
        assert lane.depth >= 1
        assert threading.current_thread() is threading.main_thread()
        events.append(what)

    class Watched(FakeCodec):
        def decode(self, encoded: Sequence[bytes], planes: int) -> list[Tensor | None]:
            note("decode")
            return super().decode(encoded, planes)

    def render(*arguments: Any) -> Tensor:
        note("draw")
        return draw_nothing(*arguments)

    empty = torch.empty

    def make(*arguments: Any, **more: Any) -> Tensor:
        if lane.depth:
            note("room")
        return empty(*arguments, **more)

    monkeypatch.setattr(loading, "lane_of", lambda device: lane)
    with opened(tmp_path) as loader:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", make)
            device_loader = DeviceLoader(loader, CPU, torch.float32, render, codec=Watched())
        assert events == ["room"]
        assert len(collected(device_loader)) == 10
    assert events.count("draw") == 10
    assert events[1:3] == ["decode", "draw"]


def test_none_of_it_is_decoded_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_many(tmp_path, 30)

    def never(self: Images, number: int, encoded: bytes) -> None:
        raise AssertionError

    with opened(tmp_path, partners="window") as loader:
        monkeypatch.setattr(type(loader.images), "_decode", never)
        assert collected(drawn(loader, FakeCodec()))
        assert loader.stats()["decodes"] == 30


def test_decode_device_is_not_ignored(tmp_path: Path) -> None:
    write_many(tmp_path, 10)

    def choose(loader: TrainLoader, render: Any, device: torch.device = CUDA, *, upload: bool = False) -> None:
        choose_training_data(loader, render, device, torch.float32, upload=upload, decode="device")

    with opened(tmp_path) as loader:
        with pytest.raises(UserError, match="render=host draws them on the host"):
            choose(loader, "host")
        for render in ("auto", "device"):
            with pytest.raises(UserError, match="needs a CUDA device"):
                choose(loader, render, CPU)
    with opened(tmp_path, cache="ram") as loader, pytest.raises(UserError, match="cache=ram keeps the decoded images"):
        choose(loader, "device")


@pytest.mark.parametrize(("keeps", "decode"), [(False, "auto"), (True, "auto"), (False, "host"), (False, "device")])
def test_who_decodes_streamed_images(
    keeps: bool, decode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is measured where nobody keeps them decoded; each rank asks for the verdict once, whatever it keeps."""
    write_many(tmp_path, 30)
    told: list[bool] = []
    codec = FakeCodec()
    monkeypatch.setattr(decoding, "NvImageCodec", lambda device, num_threads: codec)
    monkeypatch.setattr(choice, "choose_codec", lambda *a, **k: decoding.choose_codec(*a, **k, make=lambda *_: codec))
    monkeypatch.setattr(decoding, "faster_on_device", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))

    def agree(mine: bool) -> bool:
        told.append(mine)
        return True

    with opened(tmp_path, cache="ram" if keeps else "none") as loader:
        found = choice._codec_of_stream(loader, decode, CUDA, agree)
        assert found is (codec if decode != "host" and not keeps else None)
        assert told == ([not keeps] if decode == "auto" else [])
        if not keeps and decode == "auto":
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * window_bytes(loader), 1 << 40))
            with caplog.at_level(logging.INFO, "paceline"):
                choice._codec_of_stream(loader, decode, CUDA, agree)
            assert told == [True, False]
            assert "the host decodes, for cuda may need" in caplog.text


@pytest.mark.parametrize("faster", ["host", "device"])
def test_both_are_timed_with_what_they_decode(
    faster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The clock is moved by decoding alone, which threads do ahead of their turn: a factor of six leaves no doubt."""
    write_many(tmp_path, 400)
    now, lock = [0.0], threading.Lock()

    def move(seconds: float) -> None:
        with lock:
            now[0] += seconds

    class Timed(FakeCodec):
        def decode(self, encoded: Sequence[bytes], planes: int) -> list[Tensor | None]:
            move(len(encoded) * (0.0005 if faster == "device" else 0.018))
            return super().decode(encoded, planes)

    with opened(tmp_path, partners="window", batch=16) as loader, caplog.at_level(logging.INFO, "paceline"):
        device_loader = DeviceLoader(loader, CPU, torch.float32, draw_nothing, codec=Timed())
        make = loader.images._make

        def slower(number: int) -> Any:
            move(0.003)
            return make(number)

        monkeypatch.setattr(loader.images, "_make", slower)
        monkeypatch.setattr(choice.time, "perf_counter", lambda: now[0])
        given_back: list[torch.device] = []
        monkeypatch.setattr(choice, "give_back", given_back.append)
        memory = [weakref.ref(held) for held in (window_of(device_loader), window_of(device_loader).pixels)]
        gc.disable()
        try:
            chosen = choice._faster(loader, device_loader, CPU, lambda: None)
            alive = [held() is not None for held in memory]
        finally:
            gc.enable()
        monkeypatch.undo()
        assert chosen is (loader if faster == "host" else device_loader)
        assert "render=auto: the host draws" in caplog.text
        kept_on_host = len(loader.images._cache._arrays)  # type: ignore[attr-defined]
        if faster == "host":
            assert kept_on_host > 0
            assert alive == [False, False], "the window's memory is free, though its loader is held here"
            assert given_back == [CPU]
        else:
            assert kept_on_host == 0
            assert window_of(device_loader).num_images > 0
            assert alive == [True, True]
            assert given_back == []


def test_a_device_without_room_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_many(tmp_path, 10)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    with opened(tmp_path) as loader:
        monkeypatch.setattr(torch, "empty", full)
        with pytest.raises(UserError, match="choose decode=host"):
            DeviceWindow(loader, FakeCodec(), CPU, HostLane())
