from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

import pytest

from paceline.native import library as native

if TYPE_CHECKING:
    from pathlib import Path

BUILT = sorted(native.FOLDER.glob(f"{native.STEM}*"))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with a copy of the library and its source."""
    if native.library() is None:
        pytest.skip("the kernels were not built")
    for path in (*BUILT, native.FOLDER / native.SOURCE):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_kernels_are_there_where_a_compiler_is() -> None:
    """So that the tests of the kernels do not pass by being skipped."""
    assert native.library() is not None, "build them by `python setup.py build_ext --inplace`"


def test_a_copy_is_as_good(copied: Path) -> None:
    assert native.best_level(native.load(copied)) >= 0


def test_an_old_build_is_not_used(copied: Path) -> None:
    with (copied / native.SOURCE).open("a") as stream:
        stream.write("/* changed */\n")
    with pytest.raises(native.Unusable, match="another version"):
        native.load(copied)


def test_a_torn_or_foreign_library_is_not_used(copied: Path) -> None:
    for path in copied.glob(f"{native.STEM}*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(native.Unusable, match="cannot be loaded"):
        native.load(copied)


def test_a_library_without_its_source_is_not_used(copied: Path) -> None:
    (copied / native.SOURCE).unlink()
    with pytest.raises(native.Unusable, match="cannot be loaded"):
        native.load(copied)


def test_without_a_library_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="paceline"):
            assert native.library() is None
            assert native.library() is None
    finally:
        native._library.cache_clear()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "The compiled pixel kernels were not built"
    ]
