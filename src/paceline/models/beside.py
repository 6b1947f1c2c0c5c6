r"""Beside: what nothing waits for, on streams of its own, while a step is recorded as a CUDA graph.

Most kernels of a small network come and go in microseconds, in which the GPU is filled and emptied again; so two of
them side by side take less than one after the other. There are two places for that:

```
forward     neck    --- stride 8 --- stride 16 --- stride 32 ---  join        `apart`, `together`
            head         \--- branches \--- branches  \--- branches ---/

backward    maps    y' --- x' of the last layer --- x' of the one before --- ... --- wait --- handed on
            weights  \--- w' -------------------- w' ------------------- ... ---/           `beside`, `rejoin`
```
Branches of a head begin when their map is there, and autograd takes them back on the streams they came on. Nothing in
a backward pass waits for the gradient of a weight but its node (`half_weights.py`), which hands it on. And running
statistics move while the backward pass goes on. It is for recordings alone: started one by one, the host would be what
a step waits for.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

_OF_WEIGHTS = -1
"""Number of the stream for gradients of weights; branches count from 0."""
OF_STATISTICS = -2
"""That of the stream for running statistics."""
_read: dict[torch.cuda.Stream, list[Tensor]] = {}
"""What gradients of weights are still made of, by the stream that it is of: it would write over what is given back."""
_made: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
"""Tensors by their address, under whatever name they are taken, with when they are there."""
_taken: set[torch.cuda.Stream] = set()
"""Streams beside the recording one that something was started on."""


@contextmanager
def recorded(device: torch.device) -> Iterator[None]:
    """Surround all that is recorded on the current stream, by one thread at a time; nothing is held of it afterwards.

    Where it breaks off, the current stream waits for all others first: torch ends a recording in any case, and one with
    streams that have not come together again ends with an error that takes the place of what went wrong, and leaves
    torch's allocator in a recording.
    """
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # the device has given the recording up already
            for stream in _taken:
                torch.cuda.current_stream(device).wait_stream(stream)
        raise
    finally:
        for held in (_taken, _read, _made):
            held.clear()


@contextmanager
def beside(*read: Tensor, joins: bool) -> Iterator[None]:
    """Start what is started inside after all that came before, and beside what comes next.

    read: all tensors of the current stream that it reads. joins: whether `rejoin` follows before anything reads what it
    makes, in the same recording; without, and while nothing is recorded, all stays in order.
    """
    device = read[0].device
    if not joins or not _is_recording(device):
        yield
        return
    stream, current = _stream_of(device, _OF_WEIGHTS), torch.cuda.current_stream(device)
    _taken.add(stream)
    stream.wait_stream(current)
    _read.setdefault(current, []).extend(read)
    with torch.cuda.stream(stream):
        yield


def rejoin(device: torch.device, made: Iterable[Tensor]) -> None:
    """Let the current stream wait for all that was started `beside` it, whose tensors it reads from now on."""
    if _read and (current := torch.cuda.current_stream(device)) in _read:
        current.wait_stream(_stream_of(device, _OF_WEIGHTS))
        for value in made:
            value.record_stream(current)  # what comes beside another stream next does not wait for this one
        del _read[current]


def note_made(value: Tensor) -> None:
    """Remember when a tensor is there that something `apart` will take."""
    if _is_recording(value.device):
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(value.device))
        _made[value.data_ptr()] = (value, event)


@contextmanager
def apart(number: int, x: Tensor) -> Iterator[None]:
    """Start what is started inside on the stream of a number, from when x was made; what it gives is for `together`."""
    if not _is_recording(x.device):
        yield
        return
    stream, (_, event) = _stream_of(x.device, number), _made.get(x.data_ptr(), (x, None))
    _taken.add(stream)
    if event is None:
        stream.wait_stream(torch.cuda.current_stream(x.device))
    else:
        stream.wait_event(event)
    x.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def together(given: Mapping[int, Tensor]) -> None:
    """Let the current stream wait for what was started `apart`, by number, and read what that has given."""
    device = next(iter(given.values())).device
    if _is_recording(device):
        current = torch.cuda.current_stream(device)
        for number, value in given.items():
            current.wait_stream(_stream_of(device, number))
            value.record_stream(current)
        _made.clear()


def _is_recording(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    _stream_of(device, _OF_WEIGHTS)  # torch makes its streams with the first one, which no recording allows
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def _stream_of(device: torch.device, number: int) -> torch.cuda.Stream:
    priority = 0 if number < 0 else -1
    stream: torch.cuda.Stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
    return stream
