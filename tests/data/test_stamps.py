"""Stamps cover the files that count, each once, in a stable order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.data.stamps import fingerprint, stamp, walk

if TYPE_CHECKING:
    from pathlib import Path

_JPG = frozenset({".jpg"})


def _tree(root: Path) -> None:
    for name in (
        "b.jpg",
        "a.JPG",
        "deep/er/c.jpg",
        ".hidden.jpg",
        ".git/d.jpg",
        "notes.txt",
        "folder.jpg/e.jpg",
        "jpg",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def test_walk_finds_images_sorted_with_their_stamps(tmp_path: Path) -> None:
    _tree(tmp_path)
    found = walk(str(tmp_path), _JPG)
    names = [path.removeprefix(f"{tmp_path}/") for path in found]
    assert names == ["a.JPG", "b.jpg", "deep/er/c.jpg", "folder.jpg/e.jpg"]
    assert all(stamp(path) == mark for path, mark in found.items())
    assert [path.removeprefix(f"{tmp_path}/") for path in walk(str(tmp_path), _JPG, deep=False)] == ["a.JPG", "b.jpg"]


def test_links_are_followed_once_and_broken_ones_passed_over(tmp_path: Path) -> None:
    _tree(tmp_path / "real")
    inside = tmp_path / "set"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path / "real" / "deep")
    (inside / "again").symlink_to(tmp_path / "real" / "deep")
    (inside / "circle").symlink_to(inside)
    (inside / "x.jpg").symlink_to(tmp_path / "real" / "b.jpg")
    (inside / "broken.jpg").symlink_to(tmp_path / "nothing")
    assert len(walk(str(inside), _JPG)) == 2
    assert stamp(str(inside / "broken.jpg")) is None


def test_fingerprint_follows_everything_but_the_place(tmp_path: Path) -> None:
    marks = {"/set/a.jpg": (1, 2), "/set/b.jpg": (3, 4)}
    first = fingerprint("/set", marks, ("x",))
    assert (
        fingerprint("/moved", {path.replace("/set", "/moved"): mark for path, mark in marks.items()}, ("x",)) == first
    )
    others = [
        fingerprint("/set", marks | {"/set/a.jpg": (1, 3)}, ("x",)),
        fingerprint("/set", marks | {"/set/a.jpg": (2, 2)}, ("x",)),
        fingerprint("/set", marks | {"/set/c.jpg": (1, 2)}, ("x",)),
        fingerprint("/set", marks, ("y",)),
    ]
    assert len({first, *others}) == 5
