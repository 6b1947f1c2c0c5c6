"""Addresses: URLs as they may be shown, without what lets others in, which is remembered on this machine alone."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("paceline")

HIDDEN = "***"
"""Stands for a user's name and password, and for a query with a signature."""
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s/?#'\"<>]*@)?([^\s?#'\"<>]*)(\?[^\s#'\"<>]*)?(#[^\s'\"<>]*)?")
_HARMLESS = re.compile(r"\?(?:(?:versionId|version|download|raw|alt|ref)=[\w.-]*&?)*\Z", re.IGNORECASE)
"""Queries that everybody may see."""


def shown(text: str) -> str:
    """Hide user, password, query and fragment of every address in a text; a text without any stays as it is."""
    return _ADDRESS.sub(_shown, text) if "://" in text else text


def is_hidden(address: str) -> bool:
    """Tell whether something of an address was hidden, so that nothing can be reached by it."""
    return "://" in address and HIDDEN in address


def remember(address: str, folder: Path) -> None:
    """Keep an address of which something is hidden when it is shown, in a file that its user alone may read.

    Of several that look alike the last one counts. Where nothing can be written, nothing is remembered.
    """
    if not is_hidden(shown(address)) or is_hidden(address):
        return
    place = _place(address, folder)
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=place.parent, prefix=".")  # of mode 600
    except OSError as error:
        log.info("%s cannot be remembered (%s).", shown(address), error.strerror or error)
        return
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(address)
        os.replace(scratch, place)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        log.info("%s cannot be remembered (%s).", shown(address), error.strerror or error)


def recall(address: str, folder: Path) -> str:
    """Return what was hidden of an address, as it was remembered last; the address itself where nothing is known."""
    if not is_hidden(address):
        return address
    try:
        found = _place(address, folder).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return address
    return found if shown(found) == address else address


def _shown(found: re.Match[str]) -> str:
    scheme, user, path, query, _ = found.groups()
    hidden = f"?{HIDDEN}" if query and not _HARMLESS.match(query) else query or ""
    return f"{scheme}{f'{HIDDEN}@' if user else ''}{path}{hidden}"


def _place(address: str, folder: Path) -> Path:
    return folder / "addresses" / hashlib.blake2b(shown(address).encode(), digest_size=12).hexdigest()
