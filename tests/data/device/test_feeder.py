from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from pictures import KINDS, images_of, make_sources, make_transforms, targets_of

from paceline.data.device.buffers import PackBuffers
from paceline.data.device.feeder import Feeder
from paceline.data.device.lanes import HostLane, lane_of
from paceline.data.device.pack import Sources, packed
from paceline.data.device.reference import render_reference


class SlowDevice:
    """A lane whose work happens when somebody waits for it, as late as that of a device may."""

    class Mark:
        def __init__(self) -> None:
            self.passed = False

        def query(self) -> bool:
            return self.passed

    def __init__(self) -> None:
        self.pending: list[tuple[SlowDevice.Mark | None, object]] = []
        self.copies_ahead = 0
        self.depth = 0

    @contextmanager
    def working(self):
        self.depth += 1
        yield
        self.depth -= 1

    def copy(self, buffer, used):
        assert self.depth == 1
        target = torch.full((used,), 77, dtype=torch.uint8)
        self.pending.append((None, lambda: target.copy_(torch.from_numpy(buffer)[:used])))
        self.copies_ahead += 1
        return target

    def mark(self):
        mark = self.Mark()
        self.pending.append((mark, None))
        return mark

    def join(self, mark, tensors):
        self.copies_ahead -= 1
        assert all(tensor.numel() for tensor in tensors)
        self.run_to(mark)

    def run_to(self, last):
        while not last.passed:
            mark, work = self.pending.pop(0)
            if mark is None:
                work()
            else:
                mark.passed = True


def deferred(lane):
    """Renderer that draws in the lane, after what was started before."""

    def draw(sources, masks, table, size, dtype):
        out = torch.zeros(len(table.starts), size, size, 3, dtype=dtype).permute(0, 3, 1, 2)
        lane.pending.append((None, lambda: out.copy_(render_reference(sources, masks, table, size, dtype))))
        return out

    return draw


def batches(buffers, count):
    """Pack `count` different batches, one after the other, when they are asked for."""
    sources = make_sources()
    for seed in range(count):
        transforms = make_transforms(KINDS["aligned"], 2, 48, seed=seed)
        yield packed(transforms, Sources.of(images_of(transforms, sources)), targets_of(transforms), buffers.take)


def expected(count):
    return [
        batch.images.clone()
        for batch in Feeder(HostLane(), render_reference, torch.float32, ahead=0).feed(
            batches(PackBuffers(1 << 20, 2, pinned=False), count), lambda: True
        )
    ]


def test_buffers_are_not_written_before_they_are_copied() -> None:
    """The device copies as late as it may, and two buffers serve ten batches; still every picture is right."""
    for ready in (True, False):
        lane, buffers = SlowDevice(), PackBuffers(1 << 20, 3, pinned=False)
        feeder = Feeder(lane, deferred(lane), torch.float32, ahead=1)
        seen = [batch.images for batch in feeder.feed(batches(buffers, 10), lambda ready=ready: ready)]
        assert len(seen) == 10
        for images, right in zip(seen, expected(10), strict=True):
            assert torch.equal(images, right)


def test_as_many_are_ahead_as_were_asked_for_and_none_where_nothing_is_ready() -> None:
    for ahead, ready, most in ((2, True, 2), (2, False, 0), (0, True, 0)):
        lane = SlowDevice()
        feeder = Feeder(lane, deferred(lane), torch.float32, ahead=ahead)
        stream = feeder.feed(batches(PackBuffers(1 << 20, 4, pinned=False), 8), lambda ready=ready: ready)
        depths = [lane.copies_ahead for _ in stream]
        assert max(depths) == most
        assert depths[-1] == 0


def test_stopping_early_leaves_nothing_behind() -> None:
    closed = []

    def coming():
        try:
            yield from batches(PackBuffers(1 << 20, 2, pinned=False), 5)
        finally:
            closed.append(True)

    source = coming()
    stream = Feeder(HostLane(), render_reference, torch.float32, ahead=0).feed(source, lambda: False)
    next(stream)
    stream.close()
    source.close()
    assert closed == [True]
    assert isinstance(lane_of(torch.device("cpu")), HostLane)


def test_an_error_of_the_loader_reaches_the_consumer() -> None:
    def broken():
        yield from batches(PackBuffers(1 << 20, 2, pinned=False), 1)
        raise RuntimeError("disk on fire")

    stream = Feeder(HostLane(), render_reference, torch.float32, ahead=0).feed(broken(), lambda: True)
    assert next(stream).images.dtype == torch.float32
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(stream)


def test_targets_come_with_their_images() -> None:
    sources = make_sources()
    transforms = make_transforms(KINDS["aligned"], 3, 48)
    targets = targets_of(transforms) | {"boxes": np.arange(48, dtype=np.float32).reshape(3, 4, 4)}
    batch = packed(
        transforms, Sources.of(images_of(transforms, sources)), targets, PackBuffers(1 << 20, 1, pinned=False).take
    )
    (delivered,) = Feeder(HostLane(), render_reference, torch.bfloat16, ahead=0).feed(iter([batch]), lambda: True)
    assert delivered.images.dtype == torch.bfloat16
    assert delivered.network_input() is delivered.images
    np.testing.assert_array_equal(delivered.boxes.numpy(), targets["boxes"])
    np.testing.assert_array_equal(delivered.samples.numpy(), transforms.samples)
