"""The console: where the log of the package goes, and how a mistake is named."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOGGER = logging.getLogger("paceline")
_RED, _YELLOW, _PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[0m"


class ConsoleHandler(logging.Handler):
    """Writes messages to the error stream that is in place when they come, which may be a progress bar's."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message, marked when it is a warning."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # as every handler of `logging`, this one never ends the program
            self.handleError(record)


class MessageFormatter(logging.Formatter):
    """The message alone, behind `warning:` where it is one, and behind the prefix of its process, if that has one."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        """Give the line to print."""
        message = f"{self._prefix}{super().format(record)}"
        return message if record.levelno < logging.WARNING else f"{_coloured('warning:', _YELLOW)} {message}"


@contextmanager
def logging_to(handler: logging.Handler, *, prefix: str = "") -> Iterator[None]:
    """Show the package's log by `handler`, unless the program around us has set up logging of its own."""
    if _LOGGER.hasHandlers():
        yield
        return
    level = _LOGGER.level
    handler.setFormatter(MessageFormatter(prefix))
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)


def complain(sentence: str) -> None:
    """Print one sentence about a mistake, in red on a terminal."""
    print(_coloured(f"paceline: {sentence}", _RED), file=sys.stderr, flush=True)


def _coloured(text: str, colour: str) -> str:
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"{colour}{text}{_PLAIN}"
