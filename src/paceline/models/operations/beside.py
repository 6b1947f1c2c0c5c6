r"""Beside: what nothing waits for, on streams of its own, while a step is recorded as a CUDA graph.

Most kernels of a small network come and go in microseconds, in which the GPU is filled and emptied again; so two of
them side by side take less than one after the other. There are these places for that:

```
forward     neck    --- stride 8 --- stride 16 --- stride 32 ---  join        `apart`, `together`
            head         \--- branches \--- branches  \--- branches ---/

backward    maps    y' --- x' of the last layer --- x' of the one before --- ... --- wait --- handed on
            weights  \--- w' -------------------- w' ------------------- ... ---/           `beside`, `rejoin`
```
Branches of a head begin when their map is there, and autograd takes them back on the streams they came on; so does the
short one of two branches of a block whose maps are small (`aside`). Nothing in
a backward pass waits for the gradient of a weight but its node (`half_weights.py`), which hands it on; and where the
node is the whole network, only so that not too much is held of what gradients are made of. And running statistics move
while the backward pass goes on. It is for recordings alone: started one by one, the host would be what
a step waits for.
"""

from __future__ import annotations

import functools
from collections import deque
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from paceline.streams import stream_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

_OF_WEIGHTS = -1
"""Number of the stream for gradients of weights; branches count from 0."""
OF_STATISTICS = -2
"""That of the stream for running statistics."""
ASIDE = 99
"""That of the stream for the short one of two branches within a block."""
_SMALL_BYTES = 2**25
"""Of a map whose kernels are over so soon that two side by side take less than one after the other."""
_MOST_READ = 1 / 128
"""Of the device's memory."""


@dataclass(frozen=True)
class _Read:
    """What a gradient of weights is still made of."""

    values: tuple[Tensor, ...]
    stream: torch.cuda.Stream
    """That they are of: it would write over what is given back."""
    done: torch.cuda.Event

    @property
    def num_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.values)


_read: deque[_Read] = deque()
"""In the order in which it is done."""
_made: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
"""Tensors by their address, under whatever name they are taken, with when they are there; until what took them apart
has come together."""
_apart: list[int] = []
"""The address of each tensor that was taken apart."""
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
        for held in (_taken, _read, _made, _apart):
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
    with torch.cuda.stream(stream):
        yield
    _read.append(_Read(read, current, _event_of(stream)))
    _let_go(current)


def _let_go(current: torch.cuda.Stream) -> None:
    """Wait for the oldest gradients while too much is held for them; never for the latest, which has just begun."""
    held, room = sum(read.num_bytes for read in _read), _room_on(current.device)
    while held > room and len(_read) > 1:
        read = _read.popleft()
        held -= read.num_bytes
        for stream in {current, read.stream}:
            stream.wait_event(read.done)


def rejoin(device: torch.device, made: Iterable[Tensor]) -> None:
    """Let the current stream wait for all that was started `beside` any, and read what that has made."""
    if not _is_recording(device) or (stream := _stream_of(device, _OF_WEIGHTS)) not in _taken:
        return
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for value in made:
        value.record_stream(current)  # what comes beside another stream next does not wait for this one
    others = [read for read in _read if read.stream != current]
    _read.clear()
    _read.extend(others)


def note_made(value: Tensor) -> None:
    """Remember when a tensor is there that something `apart` will take."""
    if _is_recording(value.device):
        _made[value.data_ptr()] = (value, _event_of(torch.cuda.current_stream(value.device)))


@contextmanager
def apart(number: int, x: Tensor) -> Iterator[None]:
    """Start what is started inside on the stream of a number, from when x was made; what it gives is for `together`."""
    if not _is_recording(x.device):
        yield
        return
    stream, (_, event) = _stream_of(x.device, number), _made.get(x.data_ptr(), (x, None))
    _taken.add(stream)
    _apart.append(x.data_ptr())
    if event is None:
        stream.wait_stream(torch.cuda.current_stream(x.device))
    else:
        stream.wait_event(event)
    x.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def wait_for(value: Tensor) -> None:
    """Let the current stream, of those `apart`, wait until a tensor that was noted is there, and write into it."""
    if _is_recording(value.device):
        _, event = _made[value.data_ptr()]
        current = torch.cuda.current_stream(value.device)
        current.wait_event(event)
        value.record_stream(current)
        _apart.append(value.data_ptr())


def aside(x: Tensor) -> AbstractContextManager[None]:
    """Start the short branch of a block that takes x on its own stream, if x is small; `together` takes its result."""
    return apart(ASIDE, x) if x.numel() * x.element_size() <= _SMALL_BYTES else nullcontext()


def together(given: Mapping[int, Tensor]) -> None:
    """Let the current stream wait for what was started `apart` or `aside`, by number, and read what that has given."""
    device = next(iter(given.values())).device
    if _is_recording(device):
        current = torch.cuda.current_stream(device)
        for number, value in given.items():
            if (stream := _stream_of(device, number)) in _taken:
                current.wait_stream(stream)
                value.record_stream(current)
        while _apart:
            _made.pop(_apart.pop(), None)


def _is_recording(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    _stream_of(device, _OF_WEIGHTS)  # torch makes its streams with the first one, which no recording allows
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def _room_on(device: torch.device) -> int:
    """Return how many bytes may be held for gradients that have not been waited for."""
    return int(_MOST_READ * torch.cuda.get_device_properties(device).total_memory)


def _event_of(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _stream_of(device: torch.device, number: int) -> torch.cuda.Stream:
    return stream_for(f"beside {number}", device, 0 if number < 0 else -1)
