"""Near names: what the user may have meant where a path leads nowhere."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return up to three known names that resemble `name`, best first, whatever their case."""
    by_lower = {entry.lower(): entry for entry in known}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)]


def nearest_folder(path: str) -> str:
    """Return the longest part of a path that is a folder; empty where that is the current one, and not named."""
    folder = os.path.dirname(path.rstrip(os.sep))
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def no_such_path(path: str, where: str = "", extra: Iterable[str] = (), mend: str = "correct it") -> UserError:
    """Return the error for a path that does not exist, with near names that do, else with the words `mend`.

    `where` says who named the path.
    """
    folder = nearest_folder(path)
    missing = os.path.join(folder, os.path.relpath(path, folder or ".").split(os.sep)[0])
    try:
        present = sorted(entry for entry in os.listdir(folder or ".") if not entry.startswith("."))
    except OSError:
        present = []
    near = [os.path.join(folder, name) for name in near_names(os.path.basename(missing), present)]
    near += near_names(path, extra)
    subject = f"The path {path}{f', {where},' if where else ''} does not exist"
    if near:
        return UserError(f"{subject}; did you mean {' or '.join(near[:3])}?")
    if missing != path.rstrip(os.sep):
        return UserError(f"{subject} ({missing} is missing already); {mend}.")
    return UserError(f"{subject}; {mend}.")
