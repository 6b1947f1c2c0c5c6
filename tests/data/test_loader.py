from __future__ import annotations

import dataclasses
import gc
import logging
import signal
import threading
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import psutil
import pytest
import torch

from paceline.data import decode, store
from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.index import Index, Strings
from paceline.data.loader import EvalLoader, TrainLoader, num_threads
from paceline.data.order import rows_of_rank
from paceline.data.polygons import Polygons
from paceline.data.render import FILL
from paceline.errors import UserError
from paceline.letterbox import Letterbox
from paceline.native.jpeg import decode_jpeg, load_jpeg

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.batch import Batch

FIELDS = ("images", "boxes", "labels", "valid", "samples", "original_hw")


def write_set(folder: Path, *, count: int = 10, boxes_each: int = 3, suffix: str = ".png") -> Index:
    """Images of different sizes, black with bright rectangles, whose value tells the image; the index of them."""
    rng = np.random.default_rng(0)
    sizes, boxes, names = [], [], []
    for number in range(count):
        height, width = (int(side) for side in rng.integers(60, 180, 2))
        image = np.zeros((height, width, 3), np.uint8)
        for _ in range(boxes_each):
            left, top = (int(rng.integers(0, side - 30)) for side in (width, height))
            right, bottom = left + int(rng.integers(12, 30)), top + int(rng.integers(12, 30))
            image[top:bottom, left:right] = 100 + number
            boxes.append([left, top, right, bottom])
        names.append(f"{number:03d}{suffix}")
        cv2.imwrite(str(folder / names[-1]), image)
        sizes.append([height, width])
    num_boxes = len(boxes)
    boxes_M4 = np.array(boxes, float).reshape(-1, 4)
    return Index(
        names=("thing", "other"),
        root=folder,
        paths=Strings.of(names),
        sizes=np.array(sizes, np.int32),
        orientation=np.ones(count, np.uint8),
        offsets=np.arange(0, num_boxes + 1, boxes_each) if boxes_each else np.zeros(count + 1, np.int64),
        boxes=boxes_M4,
        labels=(np.arange(num_boxes) % 2).astype(np.int32),
        crowd=np.zeros(num_boxes, bool),
        difficult=np.zeros(num_boxes, bool),
        area=np.prod(boxes_M4[:, 2:] - boxes_M4[:, :2], axis=1),
        image_ids=np.arange(count),
        category_ids=np.arange(2),
        origins=np.arange(count),
    )


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return write_set(tmp_path)


@pytest.fixture(autouse=True)
def _no_thread_left() -> object:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("paceline-data")]


def loader(
    index: Index, *, workers: int = 1, batch: int = 4, rank: int = 0, world: int = 1, **more: Any
) -> TrainLoader:
    config = DataConfig(imgsz=96, batch=batch, workers=workers, cache=more.pop("cache", "auto"))
    return TrainLoader(index, config, AugmentConfig(**more), 3, rank=rank, world=world)


def same(ours: Batch, theirs: Batch) -> bool:
    return all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in FIELDS)


def collect(loader: TrainLoader, epochs: int, *, mosaic: bool = True) -> list[Batch]:
    return [batch for epoch in range(epochs) for batch in loader.epoch(epoch, mosaic=mosaic)]


def test_batches_are_what_they_promise(index: Index) -> None:
    with loader(index) as batches:
        for batch in batches.epoch(0, mosaic=True):
            assert batch.images.shape == (4, 3, 96, 96)
            assert batch.images.dtype == torch.uint8
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.boxes.shape == (4, 32, 4)
            assert batch.boxes.dtype == torch.float32
            assert batch.labels.dtype == batch.samples.dtype == batch.original_hw.dtype == torch.int64
            np.testing.assert_array_equal(batch.original_hw, index.sizes[batch.samples])
            inside = batch.boxes[batch.valid]
            assert ((inside >= 0) & (inside <= 96)).all()
            assert (inside[:, 2:] - inside[:, :2] >= 2).all()


@pytest.mark.parametrize("more", [{}, {"degrees": 20.0}, {"partners": "window", "cache": "none"}])
def test_threads_and_cache_change_no_pixel(index: Index, more: dict[str, Any]) -> None:
    with loader(index, **more) as one:
        expected = collect(one, 2)
    assert len(expected) == 5
    for workers in (2, 5):
        with loader(index, workers=workers, **{**more, "cache": "none"}) as other:
            found = collect(other, 2)
        assert all(same(*pair) for pair in zip(expected, found, strict=True))


def test_who_decodes_changes_no_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours in one step with the reading, ours by itself, another; each takes what the one before does not."""
    index = write_set(tmp_path, suffix=".jpg")
    taken: dict[str, list[bool]] = {"load_jpeg": [], "decode_jpeg": []}

    def counted(name: str, given: Any) -> Any:
        found = (load_jpeg if name == "load_jpeg" else decode_jpeg)(*given)
        taken[name].append(isinstance(found, np.ndarray))
        return found

    monkeypatch.setattr(store, "load_jpeg", lambda *given: counted("load_jpeg", given))
    monkeypatch.setattr(decode, "decode_jpeg", lambda *given: counted("decode_jpeg", given))
    is_ours = decode_jpeg((tmp_path / "000.jpg").read_bytes()) is not None
    with loader(index, cache="none") as at_once:
        expected = collect(at_once, 2)
    assert any(taken["load_jpeg"]) == is_ours
    monkeypatch.setattr(store, "load_jpeg", lambda *_: None)
    with loader(index, cache="none") as ours:
        found = [collect(ours, 2)]
    assert any(taken["decode_jpeg"]) == is_ours
    monkeypatch.setattr(decode, "decode_jpeg", lambda *_: None)
    with loader(index, cache="none") as theirs:
        found.append(collect(theirs, 2))
    for batches in found:
        assert all(same(*pair) for pair in zip(expected, batches, strict=True))


def test_any_step_can_be_the_first(index: Index) -> None:
    with loader(index) as undisturbed:
        expected = collect(undisturbed, 3)
    with loader(index, workers=2) as resumed:
        assert same(next(iter(resumed.epoch(1, mosaic=True, start_step=4))), expected[4])
        assert same(next(iter(resumed.epoch(2, mosaic=True))), expected[5])


def test_every_image_comes_once_per_pass(index: Index) -> None:
    with loader(index, batch=4) as batches:
        samples = torch.cat([batch.samples for batch in collect(batches, 2)])
        assert sum(batches.steps(epoch) for epoch in range(2)) == 5
    assert sorted(samples[:10].tolist()) == list(range(10))
    assert sorted(samples[10:].tolist()) == list(range(10))


def test_a_batch_may_be_larger_than_the_set(tmp_path: Path) -> None:
    with loader(write_set(tmp_path, count=1), batch=4) as batches:
        assert [batches.steps(epoch) for epoch in range(5)] == [1, 0, 0, 0, 1]
        (batch,) = batches.epoch(0, mosaic=True)
        assert batch.samples.tolist() == [0, 0, 0, 0]
        assert not torch.equal(batch.images[0], batch.images[1])


@pytest.mark.parametrize("more", [{}, {"degrees": 15.0}])
@pytest.mark.parametrize("mosaic", [True, False])
def test_boxes_sit_on_what_they_mark(index: Index, more: dict[str, float], mosaic: bool) -> None:
    """The middle of every box that is not cut is as bright as its rectangle, and the box has its label."""
    checked = 0
    with loader(index, hsv_h=0.0, hsv_s=0.0, hsv_v=0.0, scale=0.1, **more) as batches:
        for batch in collect(batches, 4, mosaic=mosaic):
            for picture in range(4):
                for box in batch.boxes[picture][batch.valid[picture]]:
                    x, y = ((box[:2] + box[2:]) / 2).long().tolist()
                    if min(box[2:] - box[:2]) >= 6:
                        assert batch.images[picture, 0, y, x] >= 95
                        checked += 1
    assert checked > 100


def test_crowds_and_difficult_boxes_are_no_targets(index: Index) -> None:
    index.crowd[::3] = True
    index.difficult[1::3] = True
    with loader(index, mosaic=0.0, scale=0.0, translate=0.0) as batches:
        counts = [int(batch.valid.sum(dim=1).max()) for batch in collect(batches, 1)]
    with EvalLoader(index, 96, 4, 1) as evaluation:
        counts += [int(batch.valid.sum(dim=1).max()) for batch in evaluation]
    assert set(counts) == {1}


def test_no_box_is_lost_in_dense_images(tmp_path: Path) -> None:
    index = write_set(tmp_path, count=2, boxes_each=1000)
    with EvalLoader(index, 96, 2, 1) as batches:
        (batch,) = batches
    assert batch.boxes.shape[1] == 1200
    assert batch.valid.sum().item() == 2000


def test_images_without_boxes_are_welcome(tmp_path: Path) -> None:
    index = write_set(tmp_path, count=4, boxes_each=0)
    with loader(index) as batches, EvalLoader(index, 96, 4, 1) as evaluation:
        for batch in [*collect(batches, 1), *evaluation]:
            assert batch.boxes.shape == (4, 32, 4)
            assert not batch.valid.any()


def test_each_image_is_decoded_once(index: Index) -> None:
    with loader(index, workers=3, cache="ram") as batches:
        collect(batches, 4)
        stats = batches.stats()
    assert stats["decodes"] == 10
    assert stats["cache_hits"] > 50
    assert min(stats["decode_s"], stats["render_s"], stats["waited_s"]) > 0


def write_many(folder: Path, count: int) -> Index:
    """Many images of few pixels, each of one colour."""
    index = write_set(folder, count=1, boxes_each=1)
    for number in range(count):
        cv2.imwrite(str(folder / f"{number:03d}.png"), np.full((12, 10, 3), number % 256, np.uint8))
    return dataclasses.replace(
        index,
        paths=Strings.of(f"{number:03d}.png" for number in range(count)),
        sizes=np.tile(np.array([[12, 10]], np.int32), (count, 1)),
        orientation=np.ones(count, np.uint8),
        offsets=np.arange(count + 1),
        boxes=np.tile([[2.0, 2.0, 8.0, 9.0]], (count, 1)),
        labels=np.zeros(count, np.int32),
        crowd=np.zeros(count, bool),
        difficult=np.zeros(count, bool),
        area=np.full(count, 42.0),
        image_ids=np.arange(count),
        origins=np.arange(count),
    )


def small(index: Index, rank: int = 0, world: int = 1, *, batch: int = 48, **more: Any) -> TrainLoader:
    config = DataConfig(imgsz=32, batch=batch, workers=2, cache=more.pop("cache", "none"))
    return TrainLoader(index, config, AugmentConfig(hsv_h=0.0, hsv_s=0.0, hsv_v=0.0, **more), 3, rank=rank, world=world)


@pytest.mark.parametrize("partners", ["all", "window"])
@pytest.mark.parametrize("world", [2, 3, 4, 5, 8])
def test_the_parts_of_all_ranks_are_the_batch_of_one(tmp_path: Path, partners: str, world: int) -> None:
    index = write_many(tmp_path, 101)
    with small(index, partners=partners) as one:
        expected = collect(one, 3)
    parts = []
    for rank in range(world):
        with small(index, rank, world, partners=partners) as loader:
            parts.append(collect(loader, 3))
            assert {len(batch) for batch in parts[-1]} == {len(rows_of_rank(48, rank, world))}
    for step, whole in enumerate(expected):
        for rank in range(world):
            rows = torch.from_numpy(rows_of_rank(48, rank, world))
            assert all(torch.equal(getattr(parts[rank][step], name), getattr(whole, name)[rows]) for name in FIELDS)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_with_windows_each_image_is_decoded_about_once_per_pass(tmp_path: Path, world: int) -> None:
    index, decodes = write_many(tmp_path, 3000), 0.0
    for rank in range(world):
        with small(index, rank, world, batch=16, partners="window") as loader:
            collect(loader, 2)
            decodes += loader.stats()["decodes"]
    assert 0.9 * 6000 <= decodes <= 1.002 * 6000


def test_memory_of_batches_is_used_again(index: Index) -> None:
    addresses = set()
    with loader(index) as batches:
        for epoch in range(8):
            for batch in batches.epoch(epoch, mosaic=True):
                addresses.add(batch.images.data_ptr())
        kept = collect(batches, 1)
        content = [batch.images.clone() for batch in kept]
        collect(batches, 4)
    assert len(addresses) <= 8
    assert all(torch.equal(batch.images, before) for batch, before in zip(kept, content, strict=True))


@pytest.mark.parametrize("fault", ["gone", "empty", "torn", "resized"])
def test_an_image_that_breaks_is_replaced_by_the_next(
    index: Index, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = index.path(3)
    if fault == "gone":
        path.unlink()
    elif fault == "resized":
        cv2.imwrite(str(path), np.zeros((5, 5, 3), np.uint8))
    else:
        path.write_bytes(b"" if fault == "empty" else path.read_bytes()[:-40])
    with caplog.at_level(logging.WARNING, "paceline"), loader(index, workers=2) as batches:
        samples = torch.cat([batch.samples for batch in collect(batches, 2)])
        assert batches.stats()["broken"] == 1
    assert 3 not in samples
    assert (samples == 4).sum() == 4
    assert len([record for record in caplog.records if "003.png" in record.getMessage()]) == 1


def test_the_replacement_is_drawn_like_any_image(index: Index) -> None:
    """With image 3 known to be broken from the start, or found out on the way, the batches are the same."""
    index.path(3).unlink()
    found = []
    for known in (False, True):
        with loader(index, workers=2) as batches:
            if known:
                batches.faults.add(3, "is known")
            found.append(collect(batches, 1))
    assert all(same(*pair) for pair in zip(*found, strict=True))


def test_too_many_broken_images_stop_with_the_list(index: Index) -> None:
    for number in (2, 5, 6):
        index.path(number).unlink()
    with loader(index, workers=2) as batches, pytest.raises(UserError, match=r"of 10 images cannot be read any more"):
        collect(batches, 3)
    with EvalLoader(index, 96, 4, 2) as evaluation, pytest.raises(UserError, match=r"00[256]\.png"):
        list(evaluation)


@pytest.mark.parametrize(
    ("gone", "undecodable", "words"),
    [
        ((2, 5), (), "2 of 10 images cannot be read any more; restore them"),
        ((), (2, 5), "2 of 10 images cannot be decoded; convert them to 8-bit JPEG or PNG"),
        ((2,), (5,), "2 of 10 images cannot be read any more or cannot be decoded; restore or convert them"),
    ],
)
def test_an_image_that_never_could_be_read_is_not_said_to_have_gone(
    index: Index, gone: tuple[int, ...], undecodable: tuple[int, ...], words: str
) -> None:
    for number in gone:
        index.path(number).unlink()
    for number in undecodable:
        index.path(number).write_bytes(b"II*\0 of some kind that no decoder knows")
    with loader(index, workers=1) as batches, pytest.raises(UserError, match=words):
        collect(batches, 3)


def test_an_error_of_a_thread_reaches_the_consumer(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr("paceline.data.work.render", fail)
    with loader(index, workers=2) as batches, pytest.raises(MemoryError, match="no more"):
        collect(batches, 1)


def test_leaving_in_the_middle_leaves_nothing(index: Index) -> None:
    batches = loader(index, workers=3)
    for _ in batches.epoch(0, mosaic=True):
        break
    assert len(list(batches.epoch(1, mosaic=True))) == 2
    next(batches.epoch(2, mosaic=True))
    batches.close()


def test_an_abandoned_loader_ends_its_threads(index: Index) -> None:
    """Without `close`, and with batches on their way: threads end with the loader."""
    batches = loader(index, workers=3)
    iterator = iter(batches.epoch(0, mosaic=True))
    next(iterator)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("paceline-data")]
    assert len(threads) == 3
    del batches, iterator
    gc.collect()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_memory_is_flat_over_twenty_epochs(tmp_path: Path, cache: str) -> None:
    """Of 128 batches between the 4th and the 20th epoch, not even the buffers of three stay in memory."""
    index = write_set(tmp_path, count=60)
    process = psutil.Process()
    config = DataConfig(imgsz=320, batch=8, workers=2, cache=cache)  # type: ignore[arg-type]
    with TrainLoader(index, config, AugmentConfig(partners="window"), 0) as batches:
        sizes = []
        for epoch in range(20):
            for _ in batches.epoch(epoch, mosaic=True):
                pass
            gc.collect()
            sizes.append(process.memory_info().rss)
    growth = max(sizes[3:]) - sizes[3]
    assert growth < 3 * 8 * 320 * 320 * 3, [size >> 10 for size in sizes]


def test_ctrl_c_while_waiting_does_not_hang(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr("paceline.data.work.render", lambda *_, **__: release.wait(20))
    with loader(index) as batches:
        main = threading.main_thread().ident
        timer = threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(batches.epoch(0, mosaic=True))
        release.set()
        timer.join()


@pytest.mark.parametrize("workers", [1, 3])
def test_evaluation_shows_every_image_once_letterboxed(index: Index, workers: int) -> None:
    with EvalLoader(index, 96, 4, workers) as evaluation:
        for _ in range(2):
            batches = list(evaluation)
            assert len(batches) == len(evaluation) == 3
            assert torch.cat([batch.samples for batch in batches]).tolist() == [*range(10), -1, -1]
    last = batches[-1]
    assert (last.images[2:] == FILL).all()
    assert not last.valid[2:].any()
    assert last.original_hw[2:].tolist() == [[1, 1], [1, 1]]
    for batch in batches:
        for picture, sample in enumerate(batch.samples.tolist()):
            if sample < 0:
                continue
            height, width = index.sizes[sample].tolist()
            box = Letterbox.fit(height, width, 96, 96)
            expected = box.forward(index.boxes[index.slice(sample)])
            np.testing.assert_allclose(batch.boxes[picture][batch.valid[picture]], expected, rtol=1e-6)
            assert batch.labels[picture][batch.valid[picture]].tolist() == index.labels[index.slice(sample)].tolist()
            x, y = ((expected[0, :2] + expected[0, 2:]) / 2).astype(int)
            assert batch.images[picture, 0, y, x] >= 95


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 10, 16, 17])
def test_ranks_divide_the_evaluation(tmp_path: Path, world: int, count: int) -> None:
    index = write_set(tmp_path, count=count)
    with EvalLoader(index, 96, 8, 1) as evaluation:
        whole = list(evaluation)
    seen = []
    for rank in range(world):
        with EvalLoader(index, 96, 8, 1, rank=rank, world=world) as evaluation:
            part = list(evaluation)
        rows = torch.from_numpy(rows_of_rank(8, rank, world))
        assert len(part) == len(evaluation) == len(whole)
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours.images, theirs.images[rows])
            assert torch.equal(ours.boxes, theirs.boxes[rows])
            assert torch.equal(ours.samples, theirs.samples[rows])
        seen += [sample for batch in part for sample in batch.samples.tolist() if sample >= 0]
    assert sorted(seen) == list(range(count))


def test_every_rank_needs_an_image(index: Index) -> None:
    with pytest.raises(UserError, match="batch=4 is less than the 5 devices"):
        loader(index, rank=0, world=5)


def test_an_unreadable_image_in_evaluation_is_grey(index: Index) -> None:
    index.path(5).unlink()
    with EvalLoader(index, 96, 4, 2) as evaluation:
        batches = list(evaluation)
    assert batches[1].samples.tolist() == [4, -1, 6, 7]
    assert (batches[1].images[1] == FILL).all()


def test_memory_stays_flat(index: Index) -> None:
    with loader(index, partners="window", cache="none", workers=2) as batches:
        for epoch in range(20):
            for _ in batches.epoch(epoch, mosaic=True):
                pass
        assert len(batches.images._cache) <= 10
        assert len(batches.buffers._free) <= 5


EVERYTHING = {
    "perspective": 0.0005,
    "degrees": 10.0,
    "mosaic": 0.5,
    "mixup": 0.4,
    "cutmix": 0.6,
    "copy_paste": 0.6,
    "greyscale": 0.3,
    "bgr": 0.3,
    "multi_scale": 0.5,
}


@pytest.mark.parametrize("more", [EVERYTHING, EVERYTHING | {"perspective": 0.0, "degrees": 0.0}], ids=["turned", "not"])
def test_all_augmentation_is_the_same_for_any_threads_and_from_any_step(index: Index, more: dict[str, Any]) -> None:
    outlined = dataclasses.replace(
        index, polygons=Polygons.of([box[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2)] for box in index.boxes)
    )
    with loader(outlined, **more) as one:
        expected = collect(one, 3)
    assert {batch.images.shape[2] for batch in expected} == {64, 96, 128}
    with loader(outlined, workers=3, cache="none", **more) as other:
        assert all(same(*pair) for pair in zip(expected, collect(other, 3), strict=True))
        assert same(next(iter(other.epoch(1, mosaic=True, start_step=4))), expected[4])
    for batch in expected:
        inside = batch.boxes[batch.valid]
        assert ((inside >= 0) & (inside <= batch.images.shape[2])).all()
        assert (inside[:, 2:] - inside[:, :2] >= 2).all()


def test_evaluation_in_rectangles_shows_the_same_images(index: Index) -> None:
    """Each image once, with its pixels and boxes as in a square, but for how much grey lies around."""
    with EvalLoader(index, 160, 2, 2) as squares, EvalLoader(index, 160, 2, 2, rect=True) as rectangles:
        expected = {}
        for batch in squares:
            for row, sample in enumerate(batch.samples.tolist()):
                expected[sample] = (batch.images[row], batch.boxes[row][batch.valid[row]])
        seen, shapes = [], set()
        assert len(rectangles) == len(list(rectangles)) == 5
        for batch in rectangles:
            shapes.add(tuple(batch.size_hw))
            for row, sample in enumerate(batch.samples.tolist()):
                if sample < 0:
                    assert (batch.images[row] == FILL).all()
                    continue
                seen.append(sample)
                square, rect = Letterbox.fit(*index.sizes[sample].tolist(), 160, 160), rectangles.geometry(sample)
                picture = batch.images[row][:, rect.top :, rect.left :][:, : rect.scaled_height, : rect.scaled_width]
                whole = expected[sample][0][:, square.top :, square.left :]
                assert torch.equal(picture, whole[:, : square.scaled_height, : square.scaled_width])
                moved = expected[sample][1] + torch.tensor([rect.left - square.left, rect.top - square.top] * 2)
                torch.testing.assert_close(batch.boxes[row][batch.valid[row]], moved)
    assert sorted(seen) == list(range(10))
    assert len(shapes) > 1


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(12)), raising=False)
    assert [num_threads(-1, processes) for processes in (1, 2, 4, 100)] == [8, 6, 3, 1]
    assert num_threads(5, 4) == 5
