"""Apart: evaluations of a copy of the averaged network, on a thread of their own, while training goes on."""

from __future__ import annotations

import copy
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from paceline.streams import stream_for
from paceline.training.background import Errand

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn import Module

    from paceline.records import EvaluationRecord

_PATIENCE_S = 10.0
"""How long the end of a thread is awaited that may itself wait for another rank, which is ending too."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an evaluation has found."""

    evaluation: EvaluationRecord
    seconds: float
    """That it took, beside the training."""


class Apart:
    """At most one evaluation on its way.

    ```
    main thread   epoch 1 |start 1| epoch 2        |take 1, start 2| epoch 3 ...
    thread                |===== copy of epoch 1 =====|            |=== copy of epoch 2 ===
    ```
    The weights are copied when it starts, so what is found belongs to them, however far training has gone meanwhile.
    On a GPU they are evaluated on a stream of their own, of the least priority, after the copy and beside the steps.
    """

    def __init__(
        self,
        evaluate: Callable[[Module, Callable[[], bool]], EvaluationRecord | None],
        *,
        device: torch.device,
        alone: bool,
    ) -> None:
        """Prepare.

        evaluate: takes a network, and what says whether to stop before the end; what it then returns is not used.
            The first rank gets the figures, the others None; its collectives go through a group of their own.
        alone: whether this is the only rank, so that nothing is awaited but the device.
        """
        self._evaluate = evaluate
        self._device = device
        self._alone = alone
        self._stopped = threading.Event()
        self._errand: Errand[Answer | None] | None = None
        self._network: Module | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = stream_for("evaluation", device)  # of the least priority
        self.epoch = 0
        """Of the weights that are being evaluated; 0 while there is nothing on its way."""

    def start(self, epoch: int, network: Module) -> None:
        """Copy a whole network, which may change as soon as this returns, and begin to evaluate the copy."""
        assert self._errand is None, f"epoch {self.epoch} is on its way"
        self.epoch, self._network = epoch, copy.deepcopy(network)
        copied: torch.cuda.Event | None = None
        if self._stream is not None:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(self._device))
        snapshot = self._network

        def work() -> Answer | None:
            begin = time.perf_counter()
            with ExitStack() as stack:
                if self._stream is not None and copied is not None:
                    stack.enter_context(torch.cuda.device(self._device))
                    stack.enter_context(torch.cuda.stream(self._stream))
                    self._stream.wait_event(copied)
                evaluation = self._evaluate(snapshot, self._stopped.is_set)
                if self._stream is not None:
                    self._stream.synchronize()  # before the copy's memory can go to another stream
            return None if evaluation is None else Answer(evaluation=evaluation, seconds=time.perf_counter() - begin)

        self._errand = Errand("evaluation", work, daemon=not self._alone)

    def wait(self) -> None:
        """Wait for the end of what is on its way."""
        if self._errand is not None:
            self._errand.join()

    def answer(self) -> Answer | None:
        """Return what the first rank has found, None where it is not there yet or this is another rank.

        Raises what the evaluation raised.
        """
        return self._errand.result() if self._errand is not None and self._errand.is_done else None

    def take(self) -> Module:
        """Return the weights that were evaluated, after the end on every rank; the next one may start."""
        assert self._errand is not None
        assert self._network is not None
        self._errand.result()
        network = self._network
        self.epoch, self._errand, self._network = 0, None, None
        return network

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that are being evaluated."""
        return {} if self._network is None else dict(self._network.state_dict())

    def close(self) -> None:
        """Stop what is on its way, between two batches; its thread has ended when this returns.

        Where several ranks take part, the thread may wait for one that has failed; it is then left to end with the
        process.
        """
        if self._errand is not None:
            self._stopped.set()
            self._errand.join(None if self._alone else _PATIENCE_S)
            self.epoch, self._errand, self._network = 0, None, None
