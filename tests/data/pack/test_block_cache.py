"""The block cache: what is read is what is there, fetched once, under its bound, whatever happens to its files."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline.data.pack import block_cache
from paceline.data.pack.block_cache import BlockCache, remove_oldest, stored_bytes

CONTENT = np.random.default_rng(0).bytes(10_007)


class Origin:
    """The remote file, counting what is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __call__(self, start: int, end: int) -> bytes:
        self.asked.append((start, end))
        return CONTENT[start:end]


def _cache(folder: Path, block_bytes: int = 1000, most_bytes: int = 10**9) -> BlockCache:
    return BlockCache(folder / "key", num_bytes=len(CONTENT), block_bytes=block_bytes, most_bytes=most_bytes)


def _blocks(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "key").iterdir() if path.name.isdecimal())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    reads=st.lists(st.tuples(st.integers(0, 10_006), st.integers(0, 10_007)), max_size=12),
    block_bytes=st.sampled_from([800, 1000, 10_007, 20_000]),
    most_bytes=st.sampled_from([1, 3000, 10**9]),
)
def test_every_read_is_the_part_itself(
    reads: list[tuple[int, int]], block_bytes: int, most_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    cache, origin = _cache(folder, block_bytes, most_bytes), Origin()
    for start, length in reads:
        length = min(length, len(CONTENT) - start)
        assert cache.read(start, length, origin) == CONTENT[start : start + length]
    if most_bytes == 10**9:
        assert len(origin.asked) == len(set(origin.asked)), "no block is fetched twice"


def test_blocks_are_shared_by_later_caches(tmp_path: Path) -> None:
    first, second = Origin(), Origin()
    assert _cache(tmp_path).read(0, len(CONTENT), first) == CONTENT
    assert _cache(tmp_path).read(0, len(CONTENT), second) == CONTENT
    assert len(first.asked) == 11
    assert second.asked == []


def test_threads_fetch_each_block_once(tmp_path: Path) -> None:
    cache, asked, lock = _cache(tmp_path), [], threading.Lock()
    gate = threading.Barrier(8, timeout=10)

    def fetch(start: int, end: int) -> bytes:
        with lock:
            asked.append(start)
        return CONTENT[start:end]

    def work(_: int) -> bytes:
        gate.wait()
        return cache.read(500, 9000, fetch)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(8))) == {CONTENT[500:9500]}
    assert sorted(asked) == [1000 * block for block in range(10)]


def _read_all(folder: str, log: str, start: int) -> None:
    """In a process of its own: read everything, from `start` around, and note what was fetched."""

    def fetch(first: int, last: int) -> bytes:
        with open(log, "a") as stream:
            stream.write(f"{first}\n")
        return CONTENT[first:last]

    cache = _cache(Path(folder))
    for first in [*range(start, len(CONTENT), 100), *range(0, start, 100)]:
        assert cache.read(first, min(100, len(CONTENT) - first), fetch) == CONTENT[first : first + 100]


def test_processes_fetch_each_block_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_read_all, args=(str(tmp_path), str(log), 2500 * k)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sorted(int(line) for line in log.read_text().split()) == [1000 * block for block in range(11)]


def _die_while_fetching(folder: str) -> None:
    _cache(Path(folder)).read(0, 10, lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[arg-type, return-value]


def test_a_process_that_is_killed_while_it_fetches_stops_nobody(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=_die_while_fetching, args=(str(tmp_path),))
    worker.start()
    worker.join(30)
    assert worker.exitcode == -signal.SIGKILL
    assert _cache(tmp_path).read(0, 10, Origin()) == CONTENT[:10]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "longer", "frame"])
@pytest.mark.parametrize("again", [False, True])
def test_torn_blocks_are_fetched_again(tmp_path: Path, damage: str, again: bool) -> None:
    cache, origin = _cache(tmp_path), Origin()
    cache.read(0, len(CONTENT), origin)
    path = _blocks(tmp_path)[3]
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[500] ^= 1
    elif damage == "frame":
        content[0] ^= 1
    path.write_bytes({"cut": content[:-1], "empty": b"", "longer": content + b"x"}.get(damage, content))
    origin.asked.clear()
    fresh = _cache(tmp_path) if again or damage in ("flip", "longer", "frame") else cache
    assert fresh.read(0, len(CONTENT), origin) == CONTENT
    assert origin.asked == [(3000, 4000)]
    assert _cache(tmp_path).read(0, len(CONTENT), origin) == CONTENT
    assert len(origin.asked) == 1, "it was mended for good"


def test_what_is_forgotten_is_fetched_again(tmp_path: Path) -> None:
    cache, origin = _cache(tmp_path), Origin()
    cache.read(0, len(CONTENT), origin)
    origin.asked.clear()
    cache.forget(1999, 2)
    cache.read(0, len(CONTENT), origin)
    assert origin.asked == [(1000, 2000), (2000, 3000)]


def test_the_bound_holds_and_the_oldest_go_first(tmp_path: Path) -> None:
    cache, origin = _cache(tmp_path, most_bytes=5000), Origin()
    for start in range(0, 10_000, 1000):
        cache.read(start, 10, origin)
        assert stored_bytes(tmp_path) <= 5000 * 17 / 16 + 1016
    assert _blocks(tmp_path)[-1].name == "00000009"
    assert not (tmp_path / "key/00000000").exists()
    for number, path in enumerate(sorted(_blocks(tmp_path))):
        os.utime(path, (number, number))
    remaining = [path.name for path in _blocks(tmp_path)]
    remove_oldest(tmp_path, stored_bytes(tmp_path) - 1)
    assert [path.name for path in _blocks(tmp_path)] == remaining[2:] or [
        path.name for path in _blocks(tmp_path)
    ] == remaining[1:]


def _use(folder: str, numbers: list[int]) -> None:
    """In a process of its own: read from blocks that are there."""
    cache = _cache(Path(folder))
    for number in numbers:
        cache.read(1000 * number, 10, Origin())


@pytest.mark.parametrize("by", ["this", "another object", "another process"])
def test_blocks_that_are_used_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """Whoever uses them: a block that is read again before each new one outlives those that came later."""
    monkeypatch.setattr(block_cache, "_USE_NOTED_S", 0.0)
    cache, origin = _cache(tmp_path, most_bytes=5000), Origin()
    other = _cache(tmp_path, most_bytes=5000)
    for number in range(10):
        cache.read(1000 * number, 10, origin)
        if by == "another process":
            context = multiprocessing.get_context("fork")
            worker = context.Process(target=_use, args=(str(tmp_path), [0]))
            worker.start()
            worker.join(30)
            assert worker.exitcode == 0
        else:
            (cache if by == "this" else other).read(5, 10, origin)
    assert origin.asked.count((0, 1000)) == 1
    assert [path.name for path in _blocks(tmp_path)] == ["00000000", *(f"{number:08d}" for number in range(7, 10))]


def test_a_use_is_noted_once_in_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, noted, now = _cache(tmp_path), list[object](), [0.0]
    monkeypatch.setattr(block_cache.os, "utime", lambda file, ns: noted.append(file))
    monkeypatch.setattr(block_cache.time, "monotonic", lambda: now[0])
    cache.read(0, 10, Origin())
    for _ in range(100):
        now[0] += 0.05
        cache.read(20, 10, Origin())
    assert 4 <= len(noted) <= 5


def test_the_tables_of_an_open_pack_stay(tmp_path: Path) -> None:
    cache, origin = _cache(tmp_path, most_bytes=5000), Origin()
    cache.map(0, 500, origin)
    for number in range(10):
        cache.read(1000 * number, 10, origin)
    assert (tmp_path / "key/tables").exists()
    assert stored_bytes(tmp_path) <= 5000 * 17 / 16 + 1016


def test_other_packs_and_what_a_killed_process_left_count_too(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / ".scratch").write_bytes(bytes(4000))
    os.utime(other / ".scratch", (1, 1))
    cache = _cache(tmp_path, most_bytes=5000)
    for start in range(0, 4000, 1000):
        cache.read(start, 10, Origin())
    assert not (other / ".scratch").exists()
    assert len(_blocks(tmp_path)) >= 3


def test_tables_are_fetched_once_and_mended(tmp_path: Path) -> None:
    origin = Origin()
    assert bytes(_cache(tmp_path).map(500, 9500, origin)) == CONTENT[500:9500]
    assert len(origin.asked) == 9
    assert bytes(_cache(tmp_path).map(500, 9500, origin)) == CONTENT[500:9500]
    assert len(origin.asked) == 9
    content = bytearray((tmp_path / "key/tables").read_bytes())
    for torn in (bytes(content[:-1]), b"", bytes(content[:100] + b"?" + content[101:])):
        (tmp_path / "key/tables").write_bytes(torn)
        assert bytes(_cache(tmp_path).map(500, 9500, origin)) == CONTENT[500:9500]
    assert len(origin.asked) == 36


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "key").write_text("a file is in the way")
    cache, origin = _cache(tmp_path), Origin()
    for _ in range(2):
        assert cache.read(0, len(CONTENT), origin) == CONTENT
    assert bytes(cache.map(0, 10, origin)) == CONTENT[:10]
    assert len(origin.asked) == 23
    assert sum("cannot be written" in message for message in caplog.messages) == 1


def test_an_error_of_the_origin_comes_out_and_leaves_nothing(tmp_path: Path) -> None:
    cache = _cache(tmp_path)

    def fail(start: int, end: int) -> bytes:
        raise KeyError(start)

    for read in (lambda: cache.read(0, 10, fail), lambda: cache.map(0, 10, fail)):
        with pytest.raises(KeyError):
            read()
    assert [path for path in (tmp_path / "key").iterdir() if not path.name.startswith("lock")] == []
    assert cache.read(0, 10, Origin()) == CONTENT[:10]
