"""Fixtures that every room's tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of facts and real data beside the repository; tests that need it skip where a clone does not have it."""
    folder = Path(os.environ.get("PACELINE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "facts").is_dir():
        pytest.skip("no folder of shared facts and data beside this repository")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every cache of the package out of the user's home, in one folder per test session."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path_factory.getbasetemp() / "paceline-cache"))
