"""Wording: how times, rates, figures and counts are written for people."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """`3.2 s`, `42 s`, `12:34`, `1:02:03`."""
    seconds = max(seconds, 0.0)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(per_s: float) -> str:
    """Three digits or more: `9.31`, `92.1`, `1,234`."""
    if per_s < 9.995:
        return f"{per_s:.2f}"
    return f"{per_s:.1f}" if per_s < 99.95 else f"{per_s:,.0f}"


def figure(value: float) -> str:
    """Write a figure in [0, 1] with three digits; `-` where it is undefined (COCO's -1, or NaN)."""
    return "-" if math.isnan(value) or value < 0 else f"{value:.3f}"


def plural(count: int, one: str, many: str = "") -> str:
    """`1 epoch`, `1,200 epochs`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
