"""What streams of a recorded step cost in memory, counted on the `meta` device, where there is no GPU.

    python bench/step/lent.py [--models yolo11n yolo11l yolo11x] [--images 64] [--imgsz 640]

Within one recording torch uses no memory again that went from one stream to another, and gives none of one stream to
another one (docs/decisions/0083). So beside the most that a step holds at a time, this counts the most that each stream
holds, where what was lent is held to the end. Left out are the allocator's gaps, and what is held for gradients of
weights that have not been waited for, at most a 128th of the device's memory. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from paceline import triton_kernels
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models import blocks, ends, heads
from paceline.models.operations import beside
from paceline.models.registry import build_model
from paceline.training.ahead import imagined_step

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

MAIN = "main"


class Held(TorchDispatchMode):
    """Counts the bytes of each stream while a step is imagined."""

    def __init__(self) -> None:
        super().__init__()
        self.current = MAIN
        self.now: Counter[str] = Counter()
        """By stream, and of all together under `all`; what was lent stays in the sum of its stream."""
        self.most: Counter[str] = Counter()
        self.lent_bytes = 0
        self._memory: dict[int, tuple[str, int]] = {}
        self._lent: set[int] = set()
        self._branches: dict[Any, str] = {}
        self._begins: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._see(value)
        return result

    def _see(self, value: Tensor) -> int:
        memory = value.untyped_storage()
        key = memory._cdata
        if value.is_meta and key not in self._memory:
            self._memory[key] = self.current, memory.nbytes()
            weakref.finalize(memory, self._let_go, key)
            for name in (self.current, "all"):
                self.now[name] += memory.nbytes()
                self.most[name] = max(self.most[name], self.now[name])
        return key

    def _let_go(self, key: int) -> None:
        name, num_bytes = self._memory.pop(key)
        self.now["all"] -= num_bytes
        if key in self._lent:
            self._lent.discard(key)
        else:
            self.now[name] -= num_bytes

    def lend(self, value: Tensor) -> None:
        """Take a tensor, and its gradient, for what goes from one stream to another."""
        key = self._see(value)
        if value.is_meta and key not in self._lent:
            self._lent.add(key)
            self.lent_bytes += self._memory[key][1]
        if value.requires_grad:
            value.register_hook(lambda gradient: self.lend(gradient.detach()))

    @contextmanager
    def apart(self, number: int, x: Tensor) -> Iterator[None]:
        """Stand for `beside.apart`."""
        self.lend(x)
        self._begins[number] = x.grad_fn
        before, self.current = self.current, str(number)
        yield
        self.current = before

    def aside(self, x: Tensor) -> AbstractContextManager[None]:
        """Stand for `beside.aside`."""
        self._begins.pop(beside.ASIDE, None)
        small = x.numel() * x.element_size() <= beside._SMALL_BYTES
        return self.apart(beside.ASIDE, x) if small else nullcontext()

    def together(self, given: Mapping[int, Tensor]) -> None:
        """Stand for `beside.together`: what has made these goes back on the streams on which it came."""
        for number, value in given.items():
            if number in self._begins:
                self.lend(value)
                for node in nodes_of(value.grad_fn, stops={*self._branches, self._begins[number]}):
                    self._branches[node] = str(number)

    def backward(self, total: Tensor) -> None:
        """Go back, each operation on its stream."""
        for node in nodes_of(total.grad_fn, stops=set()):
            node.register_prehook(partial(self._goes_on, self._branches.get(node, MAIN)))
        torch.autograd.backward(total)
        self.current = MAIN

    def _goes_on(self, stream: str, gradients: object) -> None:
        self.current = stream


def nodes_of(root: Any, stops: set[Any]) -> list[Any]:
    """Return the nodes of autograd's graph from a result on, up to others and to leaves."""
    found: dict[Any, None] = {}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found and node not in stops and not hasattr(node, "variable"):
            found[node] = None
            waiting += [before for before, _ in node.next_functions]
    return list(found)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let autocast and kernels be entered; nothing is compiled."""
    properties = SimpleNamespace(shared_memory_per_block_optin=227 * 1024)
    with ExitStack() as stack:
        for place, value in (
            ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            ("torch.cuda.is_bf16_supported", lambda: True),
            ("torch.cuda.current_device", lambda: 0),
            ("torch.cuda.get_device_capability", lambda device: (9, 0)),
            ("torch.cuda.get_device_properties", lambda device: properties),
        ):
            stack.enter_context(mock.patch(place, value))
        stack.enter_context(mock.patch.object(JITFunction, "warmup", _nothing))
        stack.enter_context(triton_kernels.compiled_ahead(1))
        yield


def _nothing(*given: Any, **options: Any) -> None:
    """Stand for a compilation; it holds on to nothing that it is given, as a mock would."""


def counted(model: str, images: int, side: int) -> dict[str, float]:
    """Return GB of a step: the most at a time, the most of each stream together, and what was lent."""
    network, criterion, held = build_model(model, 80), DetectionLoss(LossConfig(), 80), Held()
    with as_on_a_gpu(), ExitStack() as stack:
        for module in (heads, blocks, ends):
            for name in ("apart", "aside", "together"):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, getattr(held, name)))
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", lambda total: held.backward(total)))
        with held:
            imagined_step(network, criterion, torch.bfloat16, images=images, side=side)
    by_streams = sum(most for name, most in held.most.items() if name != "all")
    return {
        "at_once_gb": round(held.most["all"] / 1e9, 2),
        "by_streams_gb": round(by_streams / 1e9, 2),
        "lent_gb": round(held.lent_bytes / 1e9, 2),
    }


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[f"yolo11{size}" for size in "nsmlx"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--imgsz", type=int, default=640)
    options = parser.parse_args()
    found = {model: counted(model, options.images, options.imgsz) for model in options.models}
    for model, figures in found.items():
        print(model, figures)
    print(json.dumps({"images": options.images, "imgsz": options.imgsz, "models": found}))


if __name__ == "__main__":
    main()
