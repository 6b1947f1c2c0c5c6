"""A fault: why the ranks of a run were ended, as one sentence that names rank, host, step and phase. Without torch."""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict, dataclass
from typing import Final, Literal

from paceline.errors import UserError

FAILED: Final = 1
MISTAKEN: Final = 2
INTERRUPTED: Final = 130


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What went wrong, and where."""

    rank: int
    host: str
    step: int
    phase: str
    what: str
    """The middle of the sentence, such as `was killed`."""
    details: str = ""
    """Traceback of an exception."""
    status: Literal[1, 2, 130] = FAILED
    """Exit status: 2 for a mistake that the user can mend, 130 for an interruption, else 1."""

    @classmethod
    def of(cls, error: BaseException, *, rank: int, host: str, step: int, phase: str) -> Fault:
        """Describe an exception; a UserError stays the sentence that it is."""
        if isinstance(error, UserError):
            return cls(rank=rank, host=host, step=step, phase=phase, what=str(error), status=MISTAKEN)
        if isinstance(error, KeyboardInterrupt):
            return cls(rank=rank, host=host, step=step, phase=phase, what="was interrupted", status=INTERRUPTED)
        first = next(iter(str(error).strip().splitlines()), "")
        what = f"failed with {type(error).__name__}{f': {first}' if first else ''}"
        details = "".join(traceback.format_exception(error))
        return cls(rank=rank, host=host, step=step, phase=phase, what=what, details=details)

    def __str__(self) -> str:
        if self.status == MISTAKEN:
            return self.what
        return (
            f"rank {self.rank} on {self.host} {self.what} (step {self.step}, phase {self.phase}); all ranks were ended."
        )

    def to_json(self) -> str:
        """Write it for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Fault:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


class RankError(Exception):
    """A rank of a run that was launched here failed; its message is the fault's sentence."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault
