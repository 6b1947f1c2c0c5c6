"""Addresses are shown without what lets others in; on the machine that knew it, nothing is lost by that."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from paceline.addresses import is_hidden, recall, remember, shown
from paceline.commands.resume import going_on
from paceline.errors import UserError
from paceline.options import TrainOptions, TuneOptions, settle_resume

if TYPE_CHECKING:
    from pathlib import Path

SIGNED = "https://host.example/a/set.pack?X-Amz-Credential=AKIA&X-Amz-Signature=5ec4e7"
NEWLY_SIGNED = "https://host.example/a/set.pack?X-Amz-Credential=AKIA&X-Amz-Signature=0ther"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("address", "seen"),
    [
        (SIGNED, "https://host.example/a/set.pack?***"),
        ("https://me:pa@ss@host.example:81/x y", "https://***@host.example:81/x y"),
        ("https://token@host.example", "https://***@host.example"),
        ("s3://bucket/set.pack?versionId=3", "s3://bucket/set.pack?versionId=3"),
        ("s3://bucket/set.pack?versionId=3&sig=4", "s3://bucket/set.pack?***"),
        ("https://host.example/set.pack#token", "https://host.example/set.pack"),
        ("postgresql://me:secret@host/db", "postgresql://***@host/db"),
        ("sqlite:////tmp/study.db", "sqlite:////tmp/study.db"),
        ("two: http://a:b@c/d?e=f, http://g/h?i=j", "two: http://***@c/d?*** http://g/h?***"),
        ("data/set.pack?x", "data/set.pack?x"),
        ("", ""),
    ],
)
def test_what_is_shown(address: str, seen: str) -> None:
    assert shown(address) == seen
    assert shown(seen) == seen


def test_what_is_hidden_is_recalled_where_it_was_remembered(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for address in (SIGNED, NEWLY_SIGNED):
        remember(address, here)
        assert recall(shown(address), here) == address
    assert recall(SIGNED, here) == SIGNED
    assert is_hidden(recall(shown(SIGNED), there))
    (file,) = (here / "addresses").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("https://host.example/another.pack?x=1")
    assert recall(shown(SIGNED), here) == shown(SIGNED), "a file that was changed leads nowhere else"


def test_addresses_without_secrets_and_folders_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    remember("https://host.example/set.pack", tmp_path / "a")
    remember(shown(SIGNED), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").write_text("a file is in the way")
    remember(SIGNED, tmp_path / "b")
    assert is_hidden(recall(shown(SIGNED), tmp_path / "b"))


def test_a_stored_config_holds_no_secret_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = TrainOptions.from_flat({"data": SIGNED})
    options.write(tmp_path / "config.yaml")
    content = (tmp_path / "config.yaml").read_text()
    assert "5ec4e7" not in content
    assert "AKIA" not in content
    assert "data: https://host.example/a/set.pack?***" in content
    assert TrainOptions.read(tmp_path / "config.yaml") == options
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "another"))
    assert TrainOptions.read(tmp_path / "config.yaml").data.data == shown(SIGNED)
    assert "5ec4e7" in options.to_yaml(whole=True)


def test_passwords_of_storages_are_hidden_too(tmp_path: Path) -> None:
    options = TuneOptions.from_flat({"storage": "postgresql://me:secret@host/db"})
    options.write(tmp_path / "config.yaml")
    assert "secret" not in (tmp_path / "config.yaml").read_text()
    assert TuneOptions.read(tmp_path / "config.yaml") == options


def test_a_resumed_run_takes_another_signature_and_no_other_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    (run / "weights").mkdir(parents=True)
    (run / "weights/resume.safetensors").write_bytes(b"")
    TrainOptions.from_flat({"data": SIGNED, "name": "run", "epochs": 7}).write(run / "config.yaml")

    def resumed(**more: object) -> TrainOptions:
        return going_on(TrainOptions.from_flat(settle_resume({"resume": str(run), **more})))[1]

    assert resumed().data.data == SIGNED
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "another"))
    assert resumed(data=NEWLY_SIGNED).data.data == NEWLY_SIGNED
    assert resumed(data=NEWLY_SIGNED).loop.epochs == 7
    with pytest.raises(UserError, match="keeps its own data") as refused:
        resumed(data="https://host.example/b/set.pack?X-Amz-Signature=0ther")
    assert "0ther" not in str(refused.value)
    with pytest.raises(UserError, match="leave out data"):
        resumed(data="a/folder")
