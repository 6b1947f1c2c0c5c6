from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import torch

from paceline.data import shelf, slab
from paceline.data.agreement import shared_folder
from paceline.data.cache_folder import cache_folder
from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.headers import BadImage
from paceline.data.index import Index, Strings
from paceline.data.loader import EvalLoader, TrainLoader
from paceline.data.order import rows_of_rank
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.batch import Batch

COUNT, WORLDS = 40, [1, 2, 4, 8]


class MemoryStore:
    """A store of small PNG files that counts who reads what; `errors` are raised instead of reading."""

    def __init__(self, count: int = COUNT) -> None:
        self.files = [self.encoded(number) for number in range(count)]
        self.times = [1] * count
        self.reads = [0] * count
        self.errors: dict[int, Exception] = {}
        self._lock = threading.Lock()

    @staticmethod
    def encoded(number: int, side: int = 24) -> bytes:
        """A picture that tells its number; every fourth one has no colour."""
        shape = (side, 30) if number % 4 == 0 else (side, 30, 3)
        pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        return bytes(cv2.imencode(".png", pixels)[1].tobytes())

    def read(self, number: int) -> bytes:
        with self._lock:
            self.reads[number] += 1
        if number in self.errors:
            raise self.errors[number]
        return self.files[number]

    def stamp(self, number: int) -> tuple[int, int]:
        return len(self.files[number]), self.times[number]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Share nothing with other tests, and leave nothing behind."""
    (tmp_path / "shared").mkdir()
    monkeypatch.setattr(shelf, "shared_folder", lambda: tmp_path / "shared")
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    yield
    assert list((tmp_path / "shared").iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("paceline-data")]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def index_of(count: int = COUNT, root: Path = Path("/nowhere")) -> Index:
    return Index(
        names=("thing",),
        root=root,
        paths=Strings.of(f"{number}.png" for number in range(count)),
        sizes=np.tile(np.array([[24, 30]], np.int32), (count, 1)),
        orientation=np.ones(count, np.uint8),
        offsets=np.arange(count + 1),
        boxes=np.tile([[2.0, 2.0, 20.0, 19.0]], (count, 1)),
        labels=np.zeros(count, np.int32),
        crowd=np.zeros(count, bool),
        difficult=np.zeros(count, bool),
        area=np.full(count, 300.0),
        image_ids=np.arange(count),
        category_ids=np.arange(1),
        origins=np.arange(count),
    )


def loader(
    store: MemoryStore, cache: str, rank: int = 0, world: int = 1, *, batch: int = 8, **more: Any
) -> TrainLoader:
    config = DataConfig(imgsz=32, batch=batch, workers=2, cache=cache)  # type: ignore[arg-type]
    return TrainLoader(
        index_of(len(store.files)), config, AugmentConfig(**more), 3, store=store, rank=rank, world=world
    )


def collect(batches: TrainLoader, epochs: int = 2) -> list[Batch]:
    return [batch for epoch in range(epochs) for batch in batches.epoch(epoch, mosaic=True)]


def images(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


@pytest.fixture
def expected(store: MemoryStore) -> torch.Tensor:
    with loader(store, "none") as batches:
        found = images(collect(batches))
    store.reads = [0] * COUNT
    return found


@pytest.mark.parametrize("cache", ["ram", "disk", "auto"])
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_of_a_machine_decode_each_image_once_between_them(
    store: MemoryStore, expected: torch.Tensor, world: int, cache: str
) -> None:
    loaders = [loader(store, cache, rank, world) for rank in range(world)]
    whole = torch.empty_like(expected)
    for rank, batches in enumerate(loaders):
        for step, batch in enumerate(collect(batches)):
            whole[step * 8 + torch.from_numpy(rows_of_rank(8, rank, world))] = batch.images
    decodes = sum(batches.stats()["decodes"] for batches in loaders)
    for batches in loaders:
        batches.close()
    assert torch.equal(whole, expected)
    assert store.reads == [1] * COUNT
    assert decodes == COUNT


RANK = """
import json, sys
from pathlib import Path
from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.index import Index
from paceline.data.loader import TrainLoader

root, rank = Path(sys.argv[1]), int(sys.argv[2])
index, _ = Index.load(root / "index.safetensors", root)
config = DataConfig(imgsz=32, batch=8, workers=2, cache="ram")
with TrainLoader(index, config, AugmentConfig(), 3, rank=rank, world=2) as loader:
    print("open", flush=True)
    sys.stdin.readline()
    number = sum(1 for epoch in range(2) for _ in loader.epoch(epoch, mosaic=True))
    print(json.dumps({"batches": number, "decodes": loader.stats()["decodes"]}), flush=True)
    sys.stdin.readline()
"""


def test_processes_share_one_memory_and_the_last_one_removes_it(tmp_path: Path) -> None:
    index_of(root=tmp_path).save(tmp_path / "index.safetensors")
    for number in range(COUNT):
        (tmp_path / f"{number}.png").write_bytes(MemoryStore.encoded(number))
    environment = os.environ | {"PACELINE_CACHE": str(tmp_path / "cache")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    results = []
    before = set(shared_folder().glob("*"))
    try:
        for process in ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
        assert len(set(shared_folder().glob("*.run.slab"))) >= 1
        for process in ranks:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in ranks:
            assert process.stdout is not None
            results.append(json.loads(process.stdout.readline()))
        for process in ranks:
            process.communicate("end\n", timeout=30)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
    assert [result["batches"] for result in results] == [10, 10]
    assert sum(result["decodes"] for result in results) == COUNT
    assert set(shared_folder().glob("*")) <= before


@pytest.mark.parametrize("world", [1, 2])
def test_the_disk_tier_serves_the_next_run(store: MemoryStore, expected: torch.Tensor, world: int) -> None:
    for run in range(2):
        loaders = [loader(store, "disk", rank, world) for rank in range(world)]
        parts = [images(collect(batches)) for batches in loaders]
        for batches in loaders:
            batches.close()
        assert store.reads == [1] * COUNT, f"in run {run}"
    if world == 1:
        assert torch.equal(parts[0], expected)


def disk_file() -> Path:
    (found,) = (cache_folder() / "images").glob("*.slab")
    return found


@pytest.mark.parametrize("harm", ["flip", "table", "cut", "empty", "garbage", "changed file", "smaller disk"])
def test_a_harmed_disk_tier_is_mended(
    store: MemoryStore, expected: torch.Tensor, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loader(store, "disk") as batches:
        collect(batches)
    store.reads = [0] * COUNT
    path, most = disk_file(), COUNT
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[4096 + 64 * 20 + 5] ^= 4
        path.write_bytes(content)
        most = 1
    elif harm == "table":
        content[64 + 40 * 3 + 2] ^= 4
        path.write_bytes(content)
        most = 1
    elif harm == "cut":
        os.truncate(path, 4096 + 20 * 2240)
        most = COUNT - 15
    elif harm in ("empty", "garbage"):
        path.write_bytes(b"" if harm == "empty" else os.urandom(5000))
    elif harm == "changed file":
        store.times[7] = 2
        most = 1
    else:
        monkeypatch.setattr(shelf.room, "free_disk_bytes", lambda _: shelf._SPARED_DISK_BYTES + 1)
        most = 0
    with loader(store, "disk") as batches:
        assert torch.equal(images(collect(batches)), expected)
    assert (1 if most else 0) <= sum(store.reads) <= most
    store.reads = [0] * COUNT
    with loader(store, "disk") as batches:
        assert torch.equal(images(collect(batches)), expected)
    assert sum(store.reads) == 0


def test_a_disk_tier_that_no_run_has_opened_for_long_is_removed(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with loader(store, "disk") as batches:
        collect(batches)
    old = disk_file()
    long_ago = time.time() - 31 * 86_400
    os.utime(old, (long_ago, long_ago))
    other = MemoryStore(8)
    with loader(store, "disk"):  # opened again, though nothing is written to it: it counts as used
        os.utime(old, (long_ago, long_ago))
        with loader(other, "auto"):
            assert old.exists()  # old, but in use
    os.utime(old, (long_ago, long_ago))
    with loader(store, "disk"):
        assert old.stat().st_mtime > long_ago + 86_400
    os.utime(old, (long_ago + 2 * 86_400,) * 2)
    with loader(other, "auto"):
        assert old.exists()  # not old enough
    os.utime(old, (long_ago, long_ago))
    caplog.clear()
    with caplog.at_level(logging.INFO, "paceline"), loader(other, "auto"):
        assert not old.exists()
    assert [line for line in caplog.messages if "last opened 31 days ago" in line]


def test_machines_with_one_home_have_a_disk_tier_each(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf.room, "is_on_network", lambda _: True)
    for machine in ("one", "two", "one"):
        monkeypatch.setattr(shelf.platform, "node", lambda name=machine: name)
        with loader(store, "disk") as batches:
            collect(batches)
    assert store.reads == [2] * COUNT
    assert sorted(path.name for path in (cache_folder() / "images").iterdir()) == ["one", "two"]


def test_a_vanished_image_is_not_served_from_the_disk_tier(store: MemoryStore) -> None:
    with loader(store, "disk") as batches:
        collect(batches)
    store.times[5] = 0
    store.errors[5] = BadImage("cannot be read (no such file)")
    with loader(store, "disk") as batches:
        assert 5 not in torch.cat([batch.samples for batch in collect(batches)])


@pytest.mark.parametrize("where", ["at the start", "on the way"])
def test_a_full_disk_is_said_once_and_the_run_goes_on(
    store: MemoryStore,
    expected: torch.Tensor,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reserve = os.posix_fallocate
    monkeypatch.setattr(slab, "_GROWTH_BYTES", 5000)
    room = 0 if where == "at the start" else 4096 + 20_000

    def limited(descriptor: int, start: int, length: int) -> None:
        if start + length > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, start, length)

    monkeypatch.setattr(os, "posix_fallocate", limited)
    with caplog.at_level(logging.INFO, "paceline"), loader(store, "disk") as batches:
        assert torch.equal(images(collect(batches)), expected)
        assert batches.images.shelf.tier == ("ram" if where == "at the start" else "disk")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    if where == "at the start":
        assert "cache=ram takes its place" in warnings[0]
        assert store.reads == [1] * COUNT


def test_where_memory_has_no_room_the_ranks_share_a_file(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reserve = os.posix_fallocate

    def limited(descriptor: int, start: int, length: int) -> None:
        if start and str(tmp_path / "shared") in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, start, length)

    monkeypatch.setattr(os, "posix_fallocate", limited)
    loaders = [loader(store, "ram", rank, 2) for rank in range(2)]
    assert len(list((cache_folder() / "images").glob("*.run.slab"))) == 1
    for batches in loaders:
        collect(batches)
    for batches in loaders:
        batches.close()
    assert store.reads == [1] * COUNT
    assert list((cache_folder() / "images").iterdir()) == []


def test_memory_that_is_refused_is_an_answer(
    store: MemoryStore, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(shelf, "Slab", refuse)
    with caplog.at_level(logging.WARNING, "paceline"), loader(store, "ram") as batches:
        assert torch.equal(images(collect(batches)), expected)
    assert "cache=ram for training is not possible (no memory); cache=none takes its place" in caplog.text


def test_ranks_that_cannot_share_keep_their_own(
    store: MemoryStore, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(shelf, "shared_folder", lambda: tmp_path / "file" / "no folder")
    whole = torch.empty_like(expected)
    for rank in range(2):
        with caplog.at_level(logging.WARNING, "paceline"), loader(store, "ram", rank, 2) as batches:
            for step, batch in enumerate(collect(batches)):
                whole[step * 8 + torch.from_numpy(rows_of_rank(8, rank, 2))] = batch.images
    assert torch.equal(whole, expected)
    assert max(store.reads) == 2
    assert caplog.text.count("each keeps its own") == 2


def test_what_a_dead_process_left_is_removed(store: MemoryStore, tmp_path: Path) -> None:
    stale = tmp_path / "shared" / "of-the-dead.run.slab"
    stale.write_bytes(b"x" * 100)
    with loader(store, "ram", 0, 2):
        assert not stale.exists()


@pytest.mark.parametrize("world", [1, 2])
def test_encoded_images_are_read_once_and_decoded_each_time(
    store: MemoryStore, expected: torch.Tensor, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "choose", lambda facts: "encoded")
    monkeypatch.setattr(shelf.room, "free_memory_bytes", lambda: 170_000)
    loaders = [loader(store, "auto", rank, world) for rank in range(world)]
    parts = [images(collect(batches)) for batches in loaders]
    decodes = sum(batches.stats()["decodes"] for batches in loaders)
    for batches in loaders:
        batches.close()
    if world == 1:
        assert torch.equal(parts[0], expected)
    assert sum(store.reads) <= COUNT + 16  # those that were tried out are read again
    assert max(store.reads) <= 2
    assert decodes > 2 * COUNT


def test_auto_measures_when_memory_does_not_decide(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shelf.room, "free_memory_bytes", lambda: 100_000)
    with caplog.at_level(logging.INFO, "paceline"), loader(store, "auto") as batches:
        assert batches.images.shelf.tier in ("disk", "encoded", "none")
        collect(batches, 1)
    assert "cache=auto: 40 images for training need 0.1 MB decoded; 0.1 MB of memory" in caplog.text
    assert "reading one takes" in caplog.text
    assert "reading it back from disk" in caplog.text


def test_memory_that_was_asked_for_is_kept_within_what_is_free(
    store: MemoryStore, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shelf.room, "free_memory_bytes", lambda: 30_000)
    with caplog.at_level(logging.WARNING, "paceline"), loader(store, "ram") as batches:
        assert torch.equal(images(collect(batches)), expected)
        assert batches.images.decoded_set() is None
        with pytest.raises(UserError, match="does not fit"):
            batches.decoded_set()
    assert caplog.text.count("is full") == 1


def test_the_decoded_set_is_all_images_in_one_memory(store: MemoryStore) -> None:
    store.errors[9] = BadImage("is empty")
    config = DataConfig(imgsz=32, batch=8, workers=2, cache="device")
    with TrainLoader(index_of(), config, AugmentConfig(), 3, store=store, on_device=True) as batches:
        found = batches.decoded_set()
        for number in range(COUNT):
            start, height = int(found.offsets[number]), int(found.heights[number])
            if number == 9:
                assert height == 0
                continue
            assert (height, int(found.widths[number])) == (24, 30)
            assert found.planes[number] == (1 if number % 4 == 0 else 3)
            size = height * int(found.widths[number] * found.planes[number])
            pixels = batches.images.get(number)
            np.testing.assert_array_equal(found.flat[start : start + size], pixels.reshape(-1))
        assert 9 not in torch.cat([batch.samples for batch in collect(batches)])
        assert batches.stats()["broken"] == 1
    assert max(store.reads) == 1


def test_device_needs_a_device(store: MemoryStore) -> None:
    with pytest.raises(UserError, match="cache=device keeps the images on a GPU"):
        loader(store, "device")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_shares_the_tiers(store: MemoryStore, world: int) -> None:
    for _ in range(2):
        loaders = [
            EvalLoader(index_of(), 32, 8, 2, cache="disk", store=store, rank=rank, world=world) for rank in range(world)
        ]
        for batches in loaders:
            assert len(list(batches)) == len(list(batches)) == 5
        for batches in loaders:
            batches.close()
    assert store.reads == [1] * COUNT


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BadImage("is empty"), "is empty"),
        (RuntimeError("wires crossed"), r"cannot be read \(RuntimeError: wires crossed\)"),
        (KeyError("x"), "cannot be read"),
        (MemoryError(), "cannot be read"),
        (TimeoutError("the server sleeps"), "the server sleeps"),
    ],
)
@pytest.mark.parametrize("cache", ["none", "ram"])
def test_whatever_a_store_throws_costs_one_image(
    store: MemoryStore, error: Exception, reason: str, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.errors[11] = error
    with caplog.at_level(logging.WARNING, "paceline"), loader(store, cache) as batches:
        samples = torch.cat([batch.samples for batch in collect(batches)])
        assert batches.stats()["broken"] == 1
    assert 11 not in samples
    assert (samples == 12).sum() == 4
    (record,) = [record for record in caplog.records if "11.png" in record.getMessage()]
    assert pytest.importorskip("re").search(reason, record.getMessage())


def test_a_decoder_that_throws_costs_one_image(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from paceline.data import images as module

    decode, bad = module.decode_compact, store.files[11]

    def throwing(encoded: bytes, *more: Any) -> Any:
        if encoded == bad:
            raise ZeroDivisionError("in the codec")
        return decode(encoded, *more)

    monkeypatch.setattr(module, "decode_compact", throwing)
    with loader(store, "auto") as batches:
        assert 11 not in torch.cat([batch.samples for batch in collect(batches)])


def test_slow_reads_are_waited_for_counted_and_named_once(
    store: MemoryStore, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from paceline.data import images as module

    monkeypatch.setattr(module, "_SLOW_READ_S", -1.0)
    with caplog.at_level(logging.WARNING, "paceline"), loader(store, "ram") as batches:
        assert torch.equal(images(collect(batches)), expected)
        assert batches.stats()["slow_reads"] == COUNT
    assert caplog.text.count("training waits for the disk") <= 2


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_on_what_takes_the_place_of_a_broken_image(store: MemoryStore, world: int) -> None:
    """Broken images change neither how many batches a rank has, nor what the ranks make together."""
    store.errors[3] = store.errors[17] = BadImage("is empty")
    many = MemoryStore(240)
    many.errors = store.errors
    with loader(many, "none") as batches:
        whole = collect(batches)
    for rank in range(world):
        with loader(many, "none", rank, world) as batches:
            part = collect(batches)
        rows = torch.from_numpy(rows_of_rank(8, rank, world))
        assert len(part) == len(whole)
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours.samples, theirs.samples[rows])
            assert torch.equal(ours.images, theirs.images[rows])
            assert torch.equal(ours.valid.sum(dim=1), theirs.valid[rows].sum(dim=1))


def test_a_run_goes_on_in_the_middle_of_an_epoch_without_what_came_before(store: MemoryStore) -> None:
    for partners in ("all", "window"):
        with loader(store, "none", partners=partners, mosaic=0.3) as batches:
            expected = [batch for epoch in range(3) for batch in batches.epoch(epoch, mosaic=True)]
            for step in (0, 1, 6, 7, 9, 14):
                epoch = step // 5
                store.reads = [0] * COUNT
                found = list(batches.epoch(epoch, mosaic=True, start_step=step))
                assert len(found) == 5 - step % 5
                assert sum(store.reads) <= 4 * 8 * len(found)
                for ours, theirs in zip(found, expected[step : 5 * (epoch + 1)], strict=True):
                    assert torch.equal(ours.images, theirs.images)
                    assert torch.equal(ours.boxes, theirs.boxes)
            far = 10**9
            assert next(iter(batches.epoch(far // 5, mosaic=True, start_step=far))).images.shape == (8, 3, 32, 32)


def test_the_user_hears_what_no_cache_costs(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    for cache, partners, said in (("none", "all", 1), ("none", "window", 0), ("ram", "all", 0)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "paceline"), loader(store, cache, partners=partners):
            assert caplog.text.count("up to four are decoded") == said
