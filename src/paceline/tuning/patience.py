"""Patience: a storage that is locked or out of reach for a while is asked again, since trials run on meanwhile."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, TypeVar

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
log = logging.getLogger("paceline")

LONGEST_S = 3600.0
"""A storage that does not answer for so long ends the search; what was found so far is in the run folders."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0


def patiently(
    call: Callable[[], T],
    *,
    longest_s: float = LONGEST_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call until the storage answers; says so once. Raises UserError after `longest_s`."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import OperationalError

    start, pause, told = clock(), _FIRST_PAUSE_S, False
    while True:
        try:
            return call()
        except (StorageInternalError, OperationalError) as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            if clock() - start > longest_s:
                raise UserError(
                    f"The study cannot be written ({cause}); free its storage and go on with --resume."
                ) from error
            if not told:
                log.warning("The study does not answer (%s); trials run on, and it is asked again.", cause)
                told = True
            sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
