"""What a user may set about turning outputs into detections."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig:
    """From raw outputs to detections."""

    conf: float = 0.001
    """Least score of a detection."""
    iou: float = 0.7
    """Overlap above which non-maximum suppression drops the weaker of two boxes."""
    max_det: int = 300
    """Detections per image, at most."""
    agnostic_nms: bool = False
    """Let boxes of different classes suppress each other."""
