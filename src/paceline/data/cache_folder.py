"""Cache folder: where the package keeps what it can make again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from paceline.errors import UserError


def cache_folder() -> Path:
    """Return `$PACELINE_CACHE`, else `$XDG_CACHE_HOME/paceline`, else `~/.cache/paceline`; it need not exist.

    A user without a home, as in a container under a number that has no name, has it among the temporary files, readable
    for nobody else; UserError where somebody else has a folder of its name.
    """
    own = os.environ.get("PACELINE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    if shared:
        return Path(shared).expanduser() / "paceline"
    try:
        return Path.home() / ".cache" / "paceline"
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"paceline-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            raise UserError(f"{folder} is somebody else's; name a folder of yours in PACELINE_CACHE.") from None
        return folder
