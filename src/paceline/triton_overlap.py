"""Overlap: kernels that are on the GPU already when the one before them ends.

A kernel usually comes to the GPU when the one before it has ended and written all, so for about a microsecond nothing
runs. On GPUs of compute capability 9.0 a launch may allow more (*programmatic dependent launch*): its programs come as
soon as all of the kernel before have come and leave room, and wait, by an instruction, until that kernel has ended.

```
usually      |-- first --|    |-- second --|    |-- third --|
early        |-- first --|-- second --|-- third --|
                   |wait |      |wait |
```
A kernel that is launched early has to wait before it touches memory, so every one begins with `await_previous`. It
waits for all that was launched before, since what it waits for has itself waited. This module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def await_previous(early: tl.constexpr):
    """Wait until all that was launched before has ended, and let the next kernel come; nothing, unless `early`."""
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
