"""The cache folder: where it is, for users with a home and without."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from paceline.data.cache_folder import cache_folder


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


def test_a_user_without_a_home_has_a_folder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number that has no name."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert cache_folder() == Path(tempfile.gettempdir()) / f"paceline-{os.getuid()}"
