"""Compilation of a network by regions: every node by itself, and the loss on GPUs that our kernels for it do not take.

Regions keep compilation short (equal nodes share their code) and leave the graph of the network, its hooks and its keys
as they are. Each region is compiled for the shapes that it meets, forward and backward at once, when first called.
Whatever fails there (no compiler, a torn cache, a fault of the compiler) costs speed and nothing else: the region has
not run yet, so it runs as written, and so do all others from then on.
"""

from __future__ import annotations

import inspect
import logging
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, Self

import torch

from paceline.triton_kernels import usable

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from torch import Tensor, nn

    from paceline.batch import Batch
    from paceline.losses.detection import LossSums
    from paceline.parallel.engine import Criterion
    from paceline.training.compile_cache import CompileCache

log = logging.getLogger("paceline")

MOST_VARIANTS = 256
"""Versions of one region, over image sizes, numbers of boxes and the like, before it is called a failure."""


def failures() -> tuple[type[Exception], ...]:
    """List what torch raises when it cannot compile, before anything of the region has run."""
    from torch._dynamo import exc  # torch's compiler takes a second to import, which runs without it do not spend

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit


def compiles_loss(device: torch.device) -> bool:
    """Whether the loss is worth compiling: on GPUs whose kernels do not take it. On CPUs its shapes follow data."""
    return device.type == "cuda" and not usable(device)


class Compiler:
    """Compiles regions while it is open; when it closes, they run as written again."""

    def __init__(self, *, cache: CompileCache | None = None, backend: str | Callable[..., Any] = "inductor") -> None:
        """Take the cache that compiled code is kept in, opened and closed with this; None leaves that to torch."""
        self._cache = cache
        self._backend = backend
        self._stack = ExitStack()
        self._modules: list[nn.Module] = []
        self.failure = ""
        """Why nothing is compiled any more, as a sentence; empty while all is well."""

    def __enter__(self) -> Self:
        self._stack.enter_context(_settings())
        if self._cache is not None:
            self._stack.enter_context(self._cache)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let the regions run as written; keep the compiled code if the run came to a clean end."""
        if self._cache is not None and error is None and not self.failure and self._modules:
            self._cache.save()
        self._release()
        self._stack.close()

    def compile_network(self, network: nn.Module) -> None:
        """Compile the nodes of a network that compute, in place; copies of the network are not compiled."""
        for node in network.get_submodule("model").children():
            if any(True for _ in node.parameters()):
                region = _Region(self, self._compiled(node._call_impl), node._call_impl)
                node._compiled_call_impl = region  # what `nn.Module.compile` sets, and what copies leave out
                self._modules.append(node)

    def compile_criterion(self, criterion: Criterion) -> Criterion:
        """Return the criterion compiled; its assigner looks at all pairs then, which has fixed shapes."""

        def sums(predictions: tuple[Tensor, ...], batch: Batch) -> LossSums:
            return criterion(predictions, batch)

        compiled: Criterion = _Region(self, self._compiled(sums), sums)
        return compiled

    def give_up(self, error: Exception) -> None:
        """Run everything as written from now on, and say so."""
        self.failure = _sentence(error)
        log.warning("Compilation failed, so the step runs uncompiled: %s.", self.failure)
        self._release()

    def begin_anew(self, error: Exception) -> bool:
        """Whether a failure may have come from the cache, which is emptied then, and compilation is worth a new try."""
        if self._cache is None or not self._cache.drop():
            return False
        log.warning("Compiled code of an earlier run is not usable, so it is compiled anew: %s.", _sentence(error))
        torch.compiler.reset()
        return True

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": self._backend}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # from torch 2.13 on
            options["isolate_recompiles"] = True  # a call looks through the versions of its own region alone
        compiled: Callable[..., Any] = torch.compile(function, **options)
        return compiled

    def _release(self) -> None:
        for module in self._modules:
            module._compiled_call_impl = None


class _Region:
    """A function that is called compiled, as long as that works."""

    def __init__(self, compiler: Compiler, compiled: Callable[..., Any], written: Callable[..., Any]) -> None:
        self._compiler = compiler
        self._compiled = compiled
        self._written = written
        self._failures = failures()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call it, compiled or as written."""
        if not self._compiler.failure:
            try:
                return self._compiled(*arguments, **named)
            except self._failures as error:
                failure: Exception = error
            if self._compiler.begin_anew(failure):
                try:
                    return self._compiled(*arguments, **named)
                except self._failures as error:
                    failure = error
            self._compiler.give_up(failure)
        return self._written(*arguments, **named)


def _sentence(error: Exception) -> str:
    """Say what went wrong, in the first line of what torch has to say, or of what it has wrapped."""
    from torch._dynamo.exc import BackendCompilerFailed

    cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
    first = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    return f"{type(cause).__name__}: {first[:200]}".rstrip(":. ")


def _settings() -> AbstractContextManager[Any]:
    """Make the settings of torch that regions need, until this closes."""
    from torch._dynamo import config as of_dynamo
    from torch._functorch import config as of_autograd

    stack = ExitStack()
    stack.enter_context(
        of_dynamo.patch(
            recompile_limit=MOST_VARIANTS,
            accumulated_recompile_limit=64 * MOST_VARIANTS,
            optimize_ddp=False,  # which would cut regions at the edges of buckets
        )
    )
    lowering = "force_non_lazy_backward_lowering"
    if hasattr(of_autograd, lowering):  # else a backward pass is compiled when it is first needed
        stack.enter_context(of_autograd.patch({lowering: True}))
    return stack
