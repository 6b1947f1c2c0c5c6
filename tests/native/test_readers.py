"""The compiled readers are used only where they are those of the present source."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from paceline.native import readers as module
from paceline.native.readers import SOURCE, STEM, load, readers

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(module.__file__).parent


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Return a folder with the library and its source."""
    if readers() is None:
        pytest.skip("the native library was not built")
    for path in FOLDER.glob(f"{STEM}*"):
        shutil.copy(path, tmp_path)
    shutil.copy(FOLDER / SOURCE, tmp_path)
    return tmp_path


def test_copy_is_loaded(copied: Path) -> None:
    assert isinstance(load(copied), ctypes.CDLL)


def test_other_source_is_noticed(copied: Path) -> None:
    (copied / SOURCE).write_text((copied / SOURCE).read_text() + "\n")
    assert load(copied) == "were built from another version of their source"


def test_damaged_library_is_noticed(copied: Path) -> None:
    for path in copied.glob(f"{STEM}*"):
        path.write_bytes(path.read_bytes()[:100])
    assert "cannot be loaded" in str(load(copied))


def test_missing_library_is_said(tmp_path: Path) -> None:
    assert load(tmp_path) == "were not built"


@pytest.fixture
def _forgotten() -> Iterator[None]:
    readers.cache_clear()
    yield
    readers.cache_clear()


@pytest.mark.usefixtures("_forgotten")
def test_fallback_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="paceline")
    monkeypatch.setattr(module, "load", lambda _: "were not built")
    assert readers() is None
    assert readers() is None
    assert caplog.text.count("were not built") == 1
