"""Interrupts: what Ctrl-C does in the process of a command, however often it is pressed."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

STATUS = 130
"""Exit status of a command that Ctrl-C has ended."""
PATIENCE_S = 10.0
"""From this time after the first Ctrl-C on, another one ends the process at once; before, it is the same one."""


class Interrupts:
    """Handler of SIGINT: the first one raises KeyboardInterrupt, and nothing then disturbs how the command ends.

    A second one would leave threads behind where it cuts off what ends them, and Python aborts (SIGABRT, a core dump)
    when it stops such threads by itself.
    """

    def __init__(self) -> None:
        self._first_at: float | None = None

    def install(self) -> None:
        """Take over SIGINT until the process ends, unless it is ignored or handled otherwise, as under `nohup`."""
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self)
            # Python gives signals their usual effect back before its very last steps.
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle one SIGINT."""
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            raise KeyboardInterrupt
        if now - self._first_at >= PATIENCE_S:
            os.write(2, b"paceline: interrupted again; it ends at once.\n")
            os._exit(STATUS)
