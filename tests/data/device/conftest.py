"""The kernel without a GPU."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import ModuleType

    from torch import Tensor


@pytest.fixture(scope="module")
def interpreted(interpreting: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[Callable[..., Tensor]]:
    """Return the kernel, run by Triton's interpreter."""
    with interpreting("paceline.data.device.kernel") as module:
        yield partial(module.render_by_kernel, block=(64, 64))  # fewer programs: each is slow here
