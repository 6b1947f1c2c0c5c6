from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.data import room

if TYPE_CHECKING:
    from pathlib import Path


def test_bytes_are_those_of_reduced_colour_images() -> None:
    assert room.decoded_bytes(np.array([[10, 20], [11, 21]]), np.array([1, 2])) == 3 * (10 * 20 + 6 * 11)


def test_free_memory_is_some() -> None:
    assert 2**20 < room.free_memory_bytes() < 2**50


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_what_its_limit_leaves(tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (10_000_000, 4_000_000), strict=True):
        (tmp_path / name).write_text(f"{value}\n")
    (tmp_path / "memory.stat").write_text("inactive_file 1000000\ntotal_inactive_file 1000000\nother 5\n")
    monkeypatch.setattr(room, "_CGROUP" if version == 2 else "_CGROUP_1", tmp_path)
    monkeypatch.setattr(room, "_CGROUP_1" if version == 2 else "_CGROUP", tmp_path / "none")
    assert room.free_memory_bytes() == 7_000_000


@pytest.mark.parametrize("version", [1, 2])
def test_groups_within_groups(tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is in all groups from its own to the root; the tightest counts, and none outside of them."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    root = tmp_path / "groups"
    limits = {"": "max", "a": 9_000_000, "a/b": 8_000_000, "a/b/c": 1_000_000, "other": 10}
    for place, limit in limits.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, 2_000_000 if limit != 1_000_000 else 0), strict=True):
            (root / place / name).write_text(f"{value}\n")
        (root / place / "memory.stat").write_text("anon 5\n")
    (tmp_path / names[0]).write_text("1\n")  # above the root, it is no group
    (tmp_path / names[1]).write_text("0\n")
    (tmp_path / "memory.stat").write_text("anon 5\n")
    own = tmp_path / "own"
    monkeypatch.setattr(room, "_OWN_GROUPS", own)
    monkeypatch.setattr(room, "_CGROUP" if version == 2 else "_CGROUP_1", root)
    monkeypatch.setattr(room, "_CGROUP_1" if version == 2 else "_CGROUP", tmp_path / "none")
    for place, expected in (("/a/b", 6_000_000), ("/a", 7_000_000), ("/a/b/c", 1_000_000), ("/gone/too", None)):
        own.write_text(f"9:cpu,cpuacct:/x\n0::{place}\n" if version == 2 else f"9:name=systemd:/\n4:memory:{place}\n")
        found = room.free_memory_bytes()
        assert found == expected if expected is not None else found > 2**24


def test_no_limit_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    assert room.free_memory_bytes() > 2**20


def test_free_disk_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert room.free_disk_bytes(tmp_path / "not" / "there") > 2**20
    assert room.free_disk_bytes(tmp_path) == pytest.approx(room.free_disk_bytes(tmp_path / "not"), rel=0.1)


@pytest.mark.parametrize(
    ("kind", "expected"), [("ext4", False), ("nfs4", True), ("fuse.sshfs", True), ("tmpfs", False)]
)
def test_a_network_is_known_by_the_nearest_mount(
    tmp_path: Path, kind: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path}/home\\040of {kind} rw 0 0\nb /home xfs rw 0 0\n")
    monkeypatch.setattr(room, "_MOUNTS", mounts)
    assert room.is_on_network(tmp_path / "home of" / "me" / "cache") is expected
    assert not room.is_on_network(tmp_path / "elsewhere")
    monkeypatch.setattr(room, "_MOUNTS", tmp_path / "none")
    assert not room.is_on_network(tmp_path / "home of")
