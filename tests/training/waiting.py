"""Waiting: an error wherever the host waits for a CUDA device."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def errors_where_the_host_waits() -> Iterator[None]:
    """Let torch raise RuntimeError where something inside waits."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
