"""Paceline trains YOLO object detectors in the least wall-clock time that your hardware allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.errors import UserError
    from paceline.yolo import YOLO

__version__ = "0.1.0"
__all__ = ["YOLO", "UserError", "__version__"]


def __getattr__(name: str) -> object:
    """Import the Python face on first use, so that `import paceline` and `paceline --help` stay instant."""
    if name == "YOLO":
        from paceline.yolo import YOLO

        return YOLO
    if name == "UserError":
        from paceline.errors import UserError

        return UserError
    raise AttributeError(f"module 'paceline' has no attribute {name!r}")
