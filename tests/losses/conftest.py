"""The kernels of the loss without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import ModuleType

_NAMES = ("box_kernels", "assign_kernels", "sum_kernels", "fused")


@pytest.fixture
def interpreted(interpreting: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[ModuleType]:
    """Run the kernels on a CPU, wherever the loss looks for them; return `fused`."""
    with interpreting("paceline.power_kernels", *(f"paceline.losses.{name}" for name in _NAMES)) as module:
        yield module


@pytest.fixture
def by_kernels(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Let every loss on a CPU be computed by the interpreted kernels where it could be on a GPU."""
    monkeypatch.setattr("paceline.losses.detection.usable", lambda device: True)
    return interpreted
