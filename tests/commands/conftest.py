"""What all tests of commands have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _settled_threads() -> Iterator[None]:
    """Keep the number of threads as it is, since runs are compared to the last bit; see docs/decisions/0058."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo what its own one has patched
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        yield
