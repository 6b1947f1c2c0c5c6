"""Background: work that a run has done for it on threads of their own, and waits for only when it has to."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Errand(Generic[T]):
    """One piece of work on a thread of its own; its result, or its exception, is handed over to whoever asks.

    ```
    main thread   | start |  steps ...      | result() -> waits, returns or raises |
    thread                |===== work =====|                                         ends with the work
    ```
    """

    def __init__(self, name: str, work: Callable[[], T], *, daemon: bool = False) -> None:
        """Start at once.

        daemon: whether the process may end while the work is going on.
        """
        self._work = work
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"paceline-{name}", daemon=daemon)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether `result` would not wait."""
        return not self._thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """What went wrong; known once it is done."""
        return self._error

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end, or so long; whether the work has ended. Raises nothing of the work's own."""
        self._thread.join(timeout_s)
        return self.is_done

    def result(self) -> T:
        """Wait for the end; returns what the work did, or raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result[0]

    def _run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as error:  # whoever asks for the result gets it
            self._error = error
        finally:
            del self._work  # and what it holds
