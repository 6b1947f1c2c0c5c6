"""The kernels of the loss without a GPU."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

_NAMES = ("box_kernels", "assign_kernels", "sum_kernels", "fused")


@pytest.fixture
def interpreted() -> Iterator[ModuleType]:
    """Let Triton's interpreter run the kernels, on a CPU, wherever the loss looks for them; return `fused`."""
    pytest.importorskip("triton")
    room = importlib.import_module("paceline.losses")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _interpret_the_language(patch)
        for name in _NAMES:
            patch.delitem(sys.modules, f"{room.__name__}.{name}", raising=False)
            patch.delattr(room, name, raising=False)
        try:
            yield importlib.import_module("paceline.losses.fused")
        finally:
            for name in _NAMES:
                sys.modules.pop(f"{room.__name__}.{name}", None)
                vars(room).pop(name, None)


def _interpret_the_language(patch: pytest.MonkeyPatch) -> None:
    """Do for Triton's own functions, such as `tl.sum`, what it does only if told before it was imported first."""
    language = importlib.import_module("triton.language")
    compiled = importlib.import_module("triton.runtime.jit").JITFunction
    interpreted = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    for module in (language, language.standard, language.math):
        for name, value in list(vars(module).items()):
            if isinstance(value, compiled):
                patch.setattr(module, name, interpreted(value.fn))


@pytest.fixture
def by_kernels(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Let every loss on a CPU be computed by the interpreted kernels where it could be on a GPU."""
    monkeypatch.setattr("paceline.losses.detection.usable", lambda device: True)
    return interpreted
