"""Streams: one in a process for each purpose and device.

torch hands out 32 streams of each priority in turn. Whoever asked for one in each run would in the end get one that
somebody else has; and what a thread starts on a stream that another one records becomes part of the recording. Memory
is a stream's, too: what one run has let go of is there for the next one on the same streams.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def stream_for(purpose: str, device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """Return the stream of a purpose on a CUDA device, for one thread at a time.

    priority: 0 is the least there is; what is started with -1 goes before it.
    """
    stream: torch.cuda.Stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
    return stream
