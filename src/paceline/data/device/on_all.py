"""On all: what each rank has to be able to do, or none; one that cannot ends all, instead of being waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


class NowhereError(UserError):
    """What no rank can do."""


def alone(word: str) -> Sequence[str]:
    """Gather the words of one rank."""
    return [word]


def on_all(attempt: Callable[[], T], gather: Callable[[str], Sequence[str]]) -> T:
    """Return what `attempt` returns, once all ranks have made it.

    gather: gives all ranks what each of them says, in their order; every rank comes here.

    Raises NowhereError where no rank can, with the reason of this one; UserError on all ranks where some cannot, which
    names them. What is no UserError is raised when the others know.
    """
    failed: Exception | None = None
    try:
        result = attempt()
    except Exception as error:
        failed = error
    reason = "" if failed is None else str(failed) or type(failed).__name__
    reasons = gather(reason)
    unable = [f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why]
    if failed is not None and not isinstance(failed, UserError):
        raise failed
    if failed is not None and len(unable) == len(reasons):
        raise NowhereError(reason) from failed
    if unable:
        raise UserError(
            f"{len(unable)} of {len(reasons)} ranks cannot do what the others can; make them alike, or let the host "
            f"draw and decode (render=host). {' '.join(unable)}"
        ) from failed
    return result
