"""The cache folder: where it is, for users with a home and without."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from paceline.data.cache_folder import cache_folder
from paceline.errors import UserError


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PACELINE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)


def test_what_is_named_goes_before_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/paceline")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_folder() == Path("/shared/paceline")
    monkeypatch.setenv("PACELINE_CACHE", "~/own")
    assert cache_folder() == Path("/home/me/own")


def test_a_user_without_a_home_has_a_folder_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container that runs under a number that has no name."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = os.getuid()
    folder = tmp_path / f"paceline-{mine}"
    assert cache_folder() == folder
    assert folder.stat().st_mode & 0o777 == 0o700, "addresses that are remembered there may hold passwords"
    folder.rename(tmp_path / f"paceline-{mine + 1}")
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(UserError, match="is somebody else's; name a folder of yours in PACELINE_CACHE"):
        cache_folder()
