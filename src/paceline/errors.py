"""The one exception for mistakes that the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: the message is one sentence that names it and says how to mend it.

    The command line prints the message without a traceback and exits with status 2.
    Anything that goes wrong through our own fault is an `assert` or another exception, never this one.
    """
