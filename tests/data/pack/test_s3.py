"""Packs behind s3:// addresses, on moto's server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.loader import TrainLoader
from paceline.data.pack import remote
from paceline.data.pack.connection import RemoteError
from paceline.data.pack.reader import Pack
from paceline.data.pack.remote import open_remote
from paceline.data.pack.store import store_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from paceline.data.pack.connection import Patience


@pytest.fixture
def bucket(
    pack_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: Patience
) -> Iterator[tuple[ThreadedMotoServer, Any]]:
    """A server with the pack in a bucket, and a client of it; the environment leads to it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "PACELINE_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PATIENCE", patience)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 16_384)
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="sets")
    client.upload_file(str(pack_file), "sets", "a/set.pack")
    yield server, client
    server.stop()


def _contents(pack: Pack) -> list[bytes]:
    index = pack.index("train")
    return [store_of(index).read(row) for row in range(len(index))]


def test_it_is_the_same_pack_and_trains(bucket: tuple[ThreadedMotoServer, Any], pack_file: Path) -> None:
    assert _contents(open_remote("s3://sets/a/set.pack")) == _contents(Pack.open(pack_file))
    data_set = open_data_set(DataConfig(data="s3://sets/a/set.pack", imgsz=64), seed=0)
    assert data_set.train is not None
    assert data_set.val is not None
    with TrainLoader(data_set.train, DataConfig(imgsz=64, batch=8, workers=2), AugmentConfig(), 0) as loader:
        seen = [sample for batch in loader.epoch(0, mosaic=True) for sample in batch.samples.tolist()]
    assert sorted(seen) == list(range(40))


def test_the_second_run_fetches_nothing_that_is_stored(bucket: tuple[ThreadedMotoServer, Any], tmp_path: Path) -> None:
    first = _contents(open_remote("s3://sets/a/set.pack"))
    pack = open_remote("s3://sets/a/set.pack")
    pack._medium._connection.read = lambda *_: pytest.fail("a block was fetched")  # type: ignore[attr-defined]
    assert _contents(pack) == first


@pytest.mark.parametrize("address", ["s3://sets/none.pack", "s3://nowhere/set.pack"])
def test_what_is_not_there_is_one_sentence(bucket: tuple[ThreadedMotoServer, Any], address: str) -> None:
    with pytest.raises(RemoteError, match=r"there is no such file on the server \(404\)"):
        open_remote(address)


def test_an_object_that_is_replaced_stops_the_run(bucket: tuple[ThreadedMotoServer, Any], pack_file: Path) -> None:
    store = store_of(open_remote("s3://sets/a/set.pack").index("train"))
    store.read(0)
    content = bytearray(pack_file.read_bytes())
    content[64:] = bytes(byte ^ 1 for byte in content[64:])
    bucket[1].put_object(Bucket="sets", Key="a/set.pack", Body=bytes(content))
    with pytest.raises(RemoteError, match="was replaced by another file"):
        [store.read(row) for row in range(40)]


def test_a_server_that_goes_away_is_one_sentence(bucket: tuple[ThreadedMotoServer, Any]) -> None:
    store = store_of(open_remote("s3://sets/a/set.pack").index("train"))
    bucket[0].stop()
    with pytest.raises(RemoteError, match="check the network and the server"):
        store.read(39)


def test_without_credentials_an_open_bucket_is_read(
    bucket: tuple[ThreadedMotoServer, Any], pack_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket[1].put_object_acl(Bucket="sets", Key="a/set.pack", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert _contents(open_remote("s3://sets/a/set.pack")) == _contents(Pack.open(pack_file))
