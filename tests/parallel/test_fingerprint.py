"""Agreement: what differs is named with its ranks and hosts, and only that."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

import paceline
from paceline.parallel import fingerprint
from paceline.parallel.fingerprint import difference, digest_of, digest_of_package

if TYPE_CHECKING:
    import pytest


def entries(*codes: str, **more: str) -> list[tuple[str, dict[str, str]]]:
    return [(f"host{number // 2}", {"code": code, "data": "d"} | more) for number, code in enumerate(codes)]


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=9))
def test_equal_is_silence_and_unequal_is_not(codes: list[str]) -> None:
    sentence = difference(entries(*codes))
    assert (sentence == "") == (len(set(codes)) == 1)
    assert "data" not in sentence


def test_the_few_that_differ_from_most_are_named() -> None:
    assert difference(entries("a", "b", "b", "b")).startswith("Not all ranks have the same code (rank 0 on host0);")
    assert "(ranks 1 on host0, 3 on host1)" in difference(entries("a", "b", "a", "b"))
    many = difference(entries("a", *["b", "c"] * 10))
    assert "and 12 more" in many


def test_all_that_differs_is_named() -> None:
    rows = entries("a", "b")
    rows[1][1]["data"] = "other"
    sentence = difference(rows)
    assert "code (rank 1 on host0) and data (rank 1 on host0)" in sentence


def test_the_package_is_hashed_by_content_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(paceline.__file__).parent
    copy = tmp_path / "paceline"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    original = digest_of_package()
    monkeypatch.setattr(fingerprint, "__file__", str(copy / "parallel" / "fingerprint.py"))
    assert digest_of_package() == original
    (copy / "boxes.py").write_text((copy / "boxes.py").read_text() + "\n")
    changed = digest_of_package()
    assert changed != original
    (copy / "boxes.py").rename(copy / "crates.py")
    assert digest_of_package() not in (original, changed)


def test_settings_are_hashed_by_name_and_value() -> None:
    assert digest_of({"a": 1, "b": Path("x")}) == digest_of({"b": Path("x"), "a": 1})
    assert digest_of({"a": 1, "b": 2}) != digest_of({"a": 2, "b": 1})
