"""A compiled library is used only where it is that of the present source."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

import pytest

from paceline.native import compiled
from paceline.native.compiled import FOLDER, Compiled, Unusable
from paceline.native.jpeg import JPEG
from paceline.native.library import PIXELS
from paceline.native.norm import NORM
from paceline.native.readers import READERS
from paceline.native.suppression import SUPPRESSION

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


LIBRARIES = (PIXELS, READERS, SUPPRESSION, JPEG, NORM)


@pytest.fixture(params=LIBRARIES, ids=lambda library: library.name)
def library(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    yield request.param
    request.param.forget()


@pytest.fixture
def copied(library: Compiled, tmp_path: Path) -> Path:
    """A folder with a copy of the library and its source."""
    if library.get() is None:
        pytest.skip("it was not built")
    for path in (*FOLDER.glob(f"{library.stem}.*"), *(FOLDER / file for file in (library.source, *library.parts))):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_library_is_there_where_a_compiler_is(library: Compiled) -> None:
    """So that the tests of the kernels do not pass by being skipped."""
    assert library.get() is not None, "build it by `python setup.py build_ext --inplace`"


def test_every_source_is_known() -> None:
    known = {file for library in LIBRARIES for file in (library.source, *library.parts)}
    assert {path.name for path in FOLDER.glob("*.[ch]")} == known


def test_a_copy_is_as_good(library: Compiled, copied: Path) -> None:
    library.load(copied)


def test_an_old_build_is_not_used(library: Compiled, copied: Path) -> None:
    for file in (library.source, *library.parts):
        before = (copied / file).read_bytes()
        (copied / file).write_bytes(before + b"/* changed */\n")
        with pytest.raises(Unusable, match="another version"):
            library.load(copied)
        (copied / file).write_bytes(before)
    library.load(copied)


def test_a_torn_or_foreign_library_is_not_used(library: Compiled, copied: Path) -> None:
    for path in copied.glob(f"{library.stem}.*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Unusable, match="cannot be loaded"):
        library.load(copied)


def test_a_library_without_its_source_is_not_used(library: Compiled, copied: Path) -> None:
    (copied / library.source).unlink()
    with pytest.raises(Unusable, match="cannot be loaded"):
        library.load(copied)


def test_without_a_library_it_is_said_once(
    library: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "FOLDER", tmp_path)
    library.forget()
    with caplog.at_level(logging.INFO, logger="paceline"):
        assert library.get() is None
        assert library.get() is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{library.what} were not built: ")
    assert library.otherwise in record.getMessage()
