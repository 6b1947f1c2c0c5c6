"""Packs behind addresses: a real server with ranges, and one that fails in every way we know."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.data.check import check_data
from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.loader import TrainLoader
from paceline.data.pack import connection, remote
from paceline.data.pack.connection import Patience, RemoteError
from paceline.data.pack.reader import Pack
from paceline.data.pack.remote import RemoteFile, bound_bytes, open_remote
from paceline.data.pack.store import store_of
from paceline.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.data.pack.conftest import Flaky, Nginx

BLOCK = 16_384


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, patience: Patience) -> None:
    """Blocks that hold a few images, a cache of the test's own, and no waiting."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(remote, "PATIENCE", patience)


def _contents(pack: Pack) -> list[bytes]:
    return [
        store_of(index).read(row) for split in pack.splits for index in [pack.index(split)] for row in range(len(index))
    ]


def _blocks(cache: Path) -> list[Path]:
    return sorted(cache.glob("packs/*/0*"))


def test_signatures_and_passwords_are_nowhere_to_be_seen(
    flaky: Flaky, pack_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In logs, reports, names of images and errors; and blocks are found again under another signature."""
    caplog.set_level("DEBUG", "paceline")
    signed = flaky.url.replace("//", "//me:pa55@") + "?X-Amz-Signature=5ec4e7"
    flaky.faults.append("500")
    pack = open_remote(signed)
    assert _contents(pack) == _contents(Pack.open(pack_file))
    report = check_data(DataConfig(data=signed)).format_text()
    seen = [pack.address, str(pack.index("val").path(0)), report, caplog.text]
    assert str(pack.index("val").path(0)) == "set.pack/images/val/00.jpg"
    before = len(flaky.gets)
    _contents(open_remote(flaky.url.replace("//", "//me:pa55@") + "?X-Amz-Signature=0ther"))
    assert len(flaky.gets) - before <= 2, "a look at ranges, the header"
    for faults in (["404"], ["403"], ["500"] * 9):
        flaky.faults.extend(faults)
        with pytest.raises(RemoteError) as error:
            open_remote(signed)
        flaky.faults.clear()
        seen.append(str(error.value))
    with pytest.raises(UserError, match="give the whole address, with data=") as hidden:
        open_remote(pack.address)
    seen += [str(hidden.value), caplog.text]
    with pytest.raises(UserError, match="is not offered") as scheme:
        open_remote("ftp://me:pa55@host/set.pack")
    seen.append(str(scheme.value))
    assert "/set.pack?***" in "".join(seen)
    assert not [text for text in seen if "pa55" in text or "5ec4e7" in text or "0ther" in text]


class TestNginx:
    def test_it_is_the_same_pack(self, nginx: Nginx, pack_file: Path, tmp_path: Path) -> None:
        local, remote_pack = Pack.open(pack_file), open_remote(f"{nginx.url}/set.pack")
        assert remote_pack.names == local.names
        for split in local.splits:
            first, second = local.index(split), remote_pack.index(split)
            assert np.array_equal(first.boxes, second.boxes)
            assert list(first.paths) == list(second.paths)
        assert str(remote_pack.index("val").path(0)) == "set.pack/images/val/00.jpg"
        assert _contents(remote_pack) == _contents(local)

    def test_it_trains_and_is_checked(self, nginx: Nginx, pack_file: Path) -> None:
        address = f"{nginx.url}/set.pack"
        batches = []
        for data in (str(pack_file), address):
            data_set = open_data_set(DataConfig(data=data, imgsz=64), seed=0)
            assert data_set.train is not None
            config = DataConfig(imgsz=64, batch=8, workers=2)
            with TrainLoader(data_set.train, config, AugmentConfig(), 0) as loader:
                batches.append([batch.images.clone() for batch in loader.epoch(0, mosaic=True)])
        assert all(first.equal(second) for first, second in zip(*batches, strict=True))
        report = check_data(DataConfig(data=address))
        assert report.usable
        assert address in report.format_text()

    def test_the_second_run_fetches_no_image(self, nginx: Nginx) -> None:
        address = f"{nginx.url}/set.pack"
        first = _contents(open_remote(address))
        before = len(nginx.requests())
        assert _contents(open_remote(address)) == first
        assert len(nginx.requests()) - before <= 4, "size and version, a look at ranges, the header"

    def test_opening_fetches_no_image(self, nginx: Nginx, pack_file: Path, tmp_path: Path) -> None:
        open_data_set(DataConfig(data=f"{nginx.url}/set.pack"), seed=0)
        assert _blocks(tmp_path / "cache") == []
        sent = sum(int(line.split()[9]) for line in nginx.requests())
        assert sent < pack_file.stat().st_size / 4

    @pytest.mark.parametrize(
        ("path", "sentence"),
        [
            ("none.pack", r"there is no such file on the server \(404\)"),
            ("private/set.pack", r"refuses access \(403\)"),
            ("login/set.pack", r"refuses access \(403\)"),
            ("whole/set.pack", "sends whole files only"),
        ],
    )
    def test_what_trying_again_does_not_mend_is_one_sentence(self, nginx: Nginx, path: str, sentence: str) -> None:
        with pytest.raises(RemoteError, match=sentence):
            open_remote(f"{nginx.url}/{path}")
        assert len(nginx.requests()) <= 4

    def test_a_file_that_is_no_pack_is_one_sentence(self, nginx: Nginx, pack_file: Path) -> None:
        (pack_file.parent / "page.html").write_text("<html></html>" * 10)
        with pytest.raises(UserError, match="is no pack"):
            open_remote(f"{nginx.url}/page.html")

    def test_a_server_that_is_not_there_is_one_sentence(self, nginx: Nginx) -> None:
        nginx.stop()
        with pytest.raises(RemoteError, match=r"cannot be read .* after 4 tries; check the network"):
            open_remote(f"{nginx.url}/set.pack")

    def test_a_server_that_is_killed_and_comes_back(
        self, nginx: Nginx, pack_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "PATIENCE", Patience(tries=200, pause_s=0.02, most_pause_s=0.05))
        pack = open_remote(f"{nginx.url}/set.pack")
        index = pack.index("train")
        store, local = store_of(index), store_of(Pack.open(pack_file).index("train"))
        assert store.read(0) == local.read(0)
        nginx.stop()
        reader_is_waiting = threading.Event()
        pack._medium._connection._files.invalidate_cache()  # type: ignore[attr-defined]
        ask = pack._medium._connection._range  # type: ignore[attr-defined]

        def watched(start: int, end: int) -> bytes:
            try:
                return ask(start, end)  # type: ignore[no-any-return]
            finally:
                reader_is_waiting.set()

        monkeypatch.setattr(pack._medium._connection, "_range", watched)  # type: ignore[attr-defined]
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.extend(store.read(row) for row in range(len(index))))
        reader.start()
        assert reader_is_waiting.wait(20)
        assert reader.is_alive()
        nginx.start()
        reader.join(30)
        assert found == [local.read(row) for row in range(len(index))]

    def test_a_slow_server_is_waited_for(self, nginx: Nginx, pack_file: Path) -> None:
        assert _contents(open_remote(f"{nginx.url}/slow/set.pack")) == _contents(Pack.open(pack_file))

    def test_another_file_under_the_same_address_is_another_pack(self, nginx: Nginx, pack_file: Path) -> None:
        address = f"{nginx.url}/set.pack"
        first = _contents(open_remote(address))
        assert _replace_image(pack_file) != first
        assert _contents(open_remote(address)) == _contents(Pack.open(pack_file)) != first

    def test_a_file_that_is_replaced_while_it_is_read_stops_the_run(self, nginx: Nginx, pack_file: Path) -> None:
        store = store_of(open_remote(f"{nginx.url}/set.pack").index("train"))
        store.read(0)
        _replace_image(pack_file)
        with pytest.raises(RemoteError, match="was replaced by another file while it was being read"):
            [store.read(row) for row in range(40)]


def _replace_image(pack_file: Path) -> list[bytes]:
    """Replace a pack by one with other images of the same lengths, and another time; return what is in it."""
    from paceline.data.pack.writer import PackConfig, write_pack
    from paceline.data.whole_set import open_whole_set

    root = pack_file.parents[1] / "set"
    for path in root.glob("images/*/*.jpg"):
        content = bytearray(path.read_bytes())
        content[10] ^= 255  # within the comment
        path.write_bytes(content)
    write_pack(open_whole_set(str(root)).splits, pack_file, made_from="YOLO", config=PackConfig())
    stamp = pack_file.stat().st_mtime_ns + 5 * 10**9
    os.utime(pack_file, ns=(stamp, stamp))
    return _contents(Pack.open(pack_file))


class TestFaults:
    @pytest.mark.parametrize("fault", ["500", "502", "503", "429", "408", "cut", "drop"])
    def test_a_fault_that_passes_is_not_noticed(self, flaky: Flaky, pack_file: Path, fault: str) -> None:
        flaky.faults.extend([fault, fault, "", fault])
        pack = open_remote(flaky.url)
        for _ in range(3):
            flaky.faults.extend([fault, ""])
            assert _contents(pack) == _contents(Pack.open(pack_file))
        assert len(flaky.gets) >= 8

    @pytest.mark.parametrize("fault", ["500", "cut", "drop"])
    def test_a_fault_that_stays_ends_with_one_sentence(self, flaky: Flaky, fault: str) -> None:
        store = store_of(open_remote(flaky.url).index("train"))
        flaky.faults.extend([fault] * 20)
        with pytest.raises(RemoteError, match="after 4 tries; check the network and the server"):
            store.read(0)
        flaky.faults.clear()
        assert store.read(0)

    def test_a_server_that_falls_silent_is_given_up(self, flaky: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote, "PATIENCE", Patience(tries=2, pause_s=0.01, silence_s=0.2))
        store = store_of(open_remote(flaky.url).index("train"))
        flaky.faults.append("hang")
        assert store.read(0), "the second answer is good"
        flaky.faults.extend(["hang"] * 2)
        with pytest.raises(RemoteError, match="does not answer in time"):
            store.read(39)

    def test_access_that_is_taken_away_is_no_broken_image(self, flaky: Flaky) -> None:
        index = open_remote(flaky.url).index("train")
        flaky.faults.extend(["403"] * 100)
        config = DataConfig(imgsz=64, batch=8, workers=2)
        with TrainLoader(index, config, AugmentConfig(), 0) as loader, pytest.raises(RemoteError, match="403"):
            list(loader.epoch(0, mosaic=False))

    def test_a_block_that_came_damaged_is_fetched_again(self, flaky: Flaky, pack_file: Path, tmp_path: Path) -> None:
        good = pack_file.read_bytes()
        pack = open_remote(flaky.url)
        damaged = tmp_path / "damaged.pack"
        content = bytearray(good)
        content[BLOCK // 2] ^= 1
        damaged.write_bytes(content)
        medium = pack._medium
        assert isinstance(medium, RemoteFile)
        fetched = medium._connection.read
        answers = [bytes(content[:BLOCK])]
        medium._connection.read = lambda start, end: answers.pop() if answers else fetched(start, end)  # type: ignore[method-assign]
        assert _contents(pack) == _contents(Pack.open(pack_file))
        assert answers == []

    def test_an_image_that_is_damaged_on_the_server_is_a_bad_image(self, flaky: Flaky, pack_file: Path) -> None:
        from paceline.data.headers import BadImage

        start = int(Pack.open(pack_file)._entries["starts"][3])
        content = bytearray(pack_file.read_bytes())
        content[start + 9] ^= 1
        pack_file.write_bytes(content)
        store = store_of(open_remote(flaky.url).index("train"))
        with pytest.raises(BadImage, match="checksum"):
            store.read(3)
        assert store.read(4)

    def test_a_server_that_says_no_version_is_no_obstacle(self, flaky: Flaky, pack_file: Path) -> None:
        flaky.says_version = False
        size, first = pack_file.stat().st_size, _contents(open_remote(flaky.url))
        assert _replace_image(pack_file) != first
        assert pack_file.stat().st_size == size
        assert _contents(open_remote(flaky.url)) == _contents(Pack.open(pack_file))

    def test_a_torn_stored_block_is_fetched_again(self, flaky: Flaky, pack_file: Path, tmp_path: Path) -> None:
        _contents(open_remote(flaky.url))
        for path in [*_blocks(tmp_path / "cache"), *tmp_path.glob("cache/packs/*/tables")]:
            os.truncate(path, path.stat().st_size // 2)
        assert _contents(open_remote(flaky.url)) == _contents(Pack.open(pack_file))

    def test_a_cache_smaller_than_the_pack_says_so_and_works(
        self, flaky: Flaky, pack_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("PACELINE_REMOTE_CACHE", "60 kB")
        pack = open_remote(flaky.url)
        for _ in range(2):
            assert _contents(pack) == _contents(Pack.open(pack_file))
        assert any("larger than that" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("text", "expected"), [("200GB", 200 * 10**9), ("1.5 T", 1500 * 10**9), ("100", 100), ("3mib", 3 * 10**6)]
)
def test_the_bound_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: int) -> None:
    monkeypatch.setenv("PACELINE_REMOTE_CACHE", text)
    assert bound_bytes(tmp_path) == expected


def test_a_bound_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("much", "0", "-3GB"):
        monkeypatch.setenv("PACELINE_REMOTE_CACHE", text)
        with pytest.raises(UserError, match="PACELINE_REMOTE_CACHE"):
            bound_bytes(tmp_path)
    monkeypatch.delenv("PACELINE_REMOTE_CACHE")
    assert bound_bytes(tmp_path / "not/there") > 0


@pytest.mark.parametrize("address", ["http://", "http://[bad/set.pack", "http://127.0.0.1:1/ü set.pack", "s3://"])
def test_an_address_that_leads_nowhere_is_one_sentence(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", Patience(tries=2, pause_s=0.01))
    with pytest.raises(UserError):
        open_remote(address)


@pytest.mark.parametrize(("address", "extra"), [("https://host/set.pack", "http"), ("s3://bucket/set.pack", "s3")])
def test_a_package_that_is_missing_is_named(address: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(connection.importlib, "import_module", missing)
    with pytest.raises(UserError, match=rf"pip install 'paceline\[{extra}\]'"):
        open_remote(address)


def test_other_schemes_are_refused() -> None:
    with pytest.raises(UserError, match="gs:// is not offered"):
        open_remote("gs://bucket/set.pack")
