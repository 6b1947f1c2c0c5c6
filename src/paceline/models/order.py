"""Order: in which kernels of ours go through a map (`turn_kernels.py`)."""

from __future__ import annotations

AGAINST = True
"""Whether what reads a map that was just written goes against the order in which it was written: changes the time, and
the last bits of sums. A constant, for a bench to change."""
