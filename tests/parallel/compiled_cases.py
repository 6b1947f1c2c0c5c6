"""Training under an engine with compiled nodes, for the tests of compilation over several ranks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from training_runs import Run, Trainer

from paceline.training.compiling import Compiler

if TYPE_CHECKING:
    from torch import Tensor


def train_compiled(run: Run, backend: str | None) -> tuple[dict[str, dict[str, Tensor]], str]:
    """Take the run's updates, by a compiler's backend or as written; returns the whole state, and why it failed."""
    trainer, failure = Trainer(run), ""
    with ExitStack() as stack:
        compiler = None
        if backend is not None:
            compiler = stack.enter_context(Compiler(backend=backend))
            compiler.compile_network(trainer.engine.network)
        for number in range(run.updates):
            trainer.accumulate(number)
            trainer.update()
        failure = "" if compiler is None else compiler.failure
    return trainer.state(), failure
