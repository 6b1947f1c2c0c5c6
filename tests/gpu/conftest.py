"""What tests on a GPU share."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _ends_with_the_gpu() -> Iterator[None]:
    """Let a worker end where a kernel has spoilt the GPU for its process, so that a fresh one takes what is left."""
    yield
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        print(f"{os.environ.get('PYTEST_CURRENT_TEST')}: {error}", file=sys.__stderr__, flush=True)
        os._exit(1)
