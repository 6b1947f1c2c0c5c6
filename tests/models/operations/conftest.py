"""Triton's interpreter for modules of this room."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import ModuleType


@pytest.fixture(scope="session")
def operations(
    interpreting: Callable[..., AbstractContextManager[ModuleType]],
) -> Callable[..., AbstractContextManager[ModuleType]]:
    """Return what lets kernels of this room run without a GPU; takes names of modules, gives the last."""

    def interpreted(*names: str) -> AbstractContextManager[ModuleType]:
        return interpreting("paceline.power_kernels", *(f"paceline.models.operations.{name}" for name in names))

    return interpreted
