"""A graph on a processor: records what is dispatched, and does it again with the same numbers at the same addresses."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor


class Recording(TorchDispatchMode):
    """Every operation of a step with its arguments: tensors as they lie in memory, Python's numbers as they were.

    As a CUDA graph, it refuses what the host would have to wait for, knows nothing of what Python did between the
    operations, and writes results to where they lay when it was recorded.
    """

    waits: tuple[str, ...] = ("_local_scalar_dense", "nonzero", "equal")
    """Operations that are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.waits:
            raise RuntimeError(f"{func} while a graph is recorded")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, _tensors(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Do it again."""
        for func, args, kwargs, places in self.calls:
            result = func(*args, **kwargs)
            self.settle(result)
            for place, value in zip(places, _tensors(result), strict=True):
                if value.untyped_storage().data_ptr() != place.untyped_storage().data_ptr():
                    place.copy_(value)

    def settle(self, result: Any) -> None:
        """Wait for what an operation has only begun; here none does."""


class Recorder:
    """Records on a processor, where to record is also to do."""

    def __init__(self, kind: type[Recording] = Recording) -> None:
        self.recordings: list[Recording] = []
        self._kind = kind

    def aside(self) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def record(self, work: Callable[[], None]) -> Recording:
        """Record the work, and do it."""
        recording = self._kind()
        with recording:
            work()
        self.recordings.append(recording)
        return recording


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
