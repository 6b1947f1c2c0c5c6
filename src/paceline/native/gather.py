"""Gather: many rectangles of pixels copied close together into one buffer, in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from paceline.native.library import library

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]


def gather(parts: Sequence[Pixels], out: Pixels, starts: Sequence[int]) -> None:
    """Copy each part (HW or HWC, a view of any image) row by row to its start in the flat buffer `out`.

    The places must lie inside `out`, not overlap each other, nor the parts. `len(starts)` is that of `parts`.
    """
    assert out.ndim == 1
    assert out.flags.c_contiguous
    assert len(parts) == len(starts)
    for part, start in zip(parts, starts, strict=True):
        assert 0 <= start <= len(out) - part.size, "a part has to fit behind its start"
    kernels = library()
    if kernels is not None:
        gather_by_kernel(kernels, parts, out, starts)
    else:
        gather_by_numpy(parts, out, starts)


def gather_by_kernel(kernels: ctypes.CDLL, parts: Sequence[Pixels], out: Pixels, starts: Sequence[int]) -> None:
    """Do it by the compiled kernel; the GIL is free while it copies."""
    parts = [_dense_rows(part) for part in parts]  # keeps copies alive until the call is over
    base = out.ctypes.data
    rectangles = np.array(
        [
            (part.__array_interface__["data"][0], part.strides[0], part[0].size, len(part), base + start)
            for part, start in zip(parts, starts, strict=True)
            if part.size
        ],
        dtype=np.int64,
    )
    kernels.paceline_gather(rectangles.ctypes.data, len(rectangles))


def gather_by_numpy(parts: Sequence[Pixels], out: Pixels, starts: Sequence[int]) -> None:
    """Do it part by part."""
    for part, start in zip(parts, starts, strict=True):
        np.copyto(out[start : start + part.size].reshape(part.shape), part)


def _dense_rows(part: Pixels) -> Pixels:
    """Return the part with the bytes of each row close together, as it is where they lie so."""
    dense = (part.shape[2], 1) if part.ndim == 3 else (1,)
    return part if part.strides[1:] == dense else np.ascontiguousarray(part)
