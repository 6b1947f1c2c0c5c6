"""The kernel without a GPU."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Tensor]]:
    """Return the kernel, run by Triton's interpreter."""
    pytest.importorskip("triton")
    name = "paceline.data.device.kernel"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        before = sys.modules.pop(name, None)
        module = importlib.import_module(name)
        yield partial(module.render_by_kernel, block=(64, 64))  # fewer programs: each is slow here
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
