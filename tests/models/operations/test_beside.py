"""Streams of a recording, on a stand-in for CUDA's: who waits for whom, and what is held until then."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import paceline.models.operations
from paceline.models import ends
from paceline.models.blocks import C3k
from paceline.models.convolution import Convolution
from paceline.models.heads import DetectionHead
from paceline.models.operations import beside, half_weights
from paceline.models.operations.beside import apart, note_made, recorded, rejoin, together
from paceline.models.operations.parted_conv import gradients_apart
from paceline.models.registry import build_model
from paceline.parallel.norms import BatchStatistics
from paceline.training.graphed import CudaCapture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

DEVICE = torch.device("cpu")


@dataclass(eq=False)
class Stream:
    """Remembers what had been started on each stream that it waited for."""

    device = DEVICE

    gpu: Gpu
    name: str
    started: int = 0
    """Operations so far."""
    seen: dict[str, int] = field(default_factory=dict)
    """How far each other stream had come that this one has waited for."""

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(Event.of(other))

    def wait_event(self, event: Event) -> None:
        for name, count in event.known.items():
            self.seen[name] = max(self.seen.get(name, 0), count)

    def knows(self, name: str, count: int) -> bool:
        """Whether what a stream had started by then is over when this one goes on."""
        return name == self.name or self.seen.get(name, 0) >= count


@dataclass
class Event:
    known: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, stream: Stream) -> Event:
        return cls(stream.seen | {stream.name: stream.started})

    def record(self, stream: Stream) -> None:
        self.known = Event.of(stream).known


class Gpu:
    """Streams by number, the one that is current, and who wrote what last."""

    def __init__(self) -> None:
        self.main = Stream(self, "main")
        self.current = self.main
        self.streams: dict[int, Stream] = {}
        self.written: dict[int, tuple[str, int, Tensor]] = {}
        """By address: stream, place in it, and the tensor, which keeps the address its own."""
        self.lent: list[tuple[int, str]] = []

    def stream_of(self, device: torch.device, number: int) -> Stream:
        return self.streams.setdefault(number, Stream(self, str(number)))

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def does(self, reads: list[Tensor], writes: list[Tensor]) -> None:
        """Start an operation on the current stream; what it reads has to be there."""
        for value in reads:
            if value.data_ptr() in self.written:
                name, count, _ = self.written[value.data_ptr()]
                assert self.current.knows(name, count), f"{self.current.name} reads what {name} may not have written"
        self.current.started += 1
        for value in writes:
            self.written[value.data_ptr()] = (self.current.name, self.current.started, value)


class Watched(torch.utils._python_dispatch.TorchDispatchMode):
    """Every operation of torch's is one of the stand-in's."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        reads = [value for value in given if isinstance(value, torch.Tensor)]
        made = [value for value in torch.utils._pytree.tree_leaves(result) if isinstance(value, torch.Tensor)]
        there = {value.data_ptr() for value in reads}
        fresh = [value for value in made if value.data_ptr() not in there or func._schema.is_mutable]
        self.gpu.does(reads, fresh)
        return result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(beside, "_is_recording", lambda device: True)
    monkeypatch.setattr(half_weights, "on_gpu", lambda values: True)
    monkeypatch.setattr(beside, "_stream_of", found.stream_of)
    monkeypatch.setattr(beside, "_room_on", lambda device: 1 << 20)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: found.current)
    monkeypatch.setattr(torch.cuda, "stream", found.on)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda value, stream: found.lent.append((value.data_ptr(), stream.name))
    )
    return found


def test_branches_begin_when_their_map_is_there_and_all_are_waited_for(gpu: Gpu) -> None:
    torch.manual_seed(0)
    head = DetectionHead((16, 32, 64), 3, depthwise=True).train()
    levels = []
    with Watched(gpu), torch.autocast("cpu", dtype=torch.bfloat16):
        for number, (channels, side) in enumerate(((16, 8), (32, 4), (64, 2))):
            levels.append(torch.rand(2, channels, side, side))
            note_made(levels[-1])
            gpu.main.started += 100 * (number + 1)  # the neck goes on
        outputs = head(*levels)
        outputs[0].sum()
    assert set(gpu.streams) == set(range(6))
    main_knows = [gpu.main.seen[str(number)] for number in range(6)]
    assert main_knows == [gpu.streams[number].started for number in range(6)]
    starts = [gpu.streams[number].seen["main"] for number in range(6)]
    assert starts[0] == starts[3] < starts[1] == starts[4] < starts[2] == starts[5] < 600, "not when the neck has ended"
    for number in range(6):
        assert (levels[number % 3].data_ptr(), str(number)) in gpu.lent
    assert sum(name == "main" for _, name in gpu.lent) == 6, "what branches give is read by the main stream"
    assert not beside._made


def test_a_map_is_there_under_any_of_its_names(gpu: Gpu) -> None:
    x = torch.rand(1, 4)
    gpu.main.started = 7
    note_made(x)
    gpu.main.started = 9
    with apart(2, x.detach()):
        assert gpu.current.seen == {"main": 7}
    together({2: x})


def test_a_branch_whose_map_was_not_noted_waits_for_all_there_is(gpu: Gpu) -> None:
    x = torch.rand(1, 4)
    gpu.main.started = 7
    with apart(2, x):
        assert gpu.current.seen == {"main": 7}
    gpu.streams[2].started = 3
    together(dict(enumerate([torch.rand(1, 4), torch.rand(1, 4), x])))
    assert gpu.main.seen["2"] == 3
    assert gpu.main.seen.keys() <= {"main", "2"}, "a stream that took no part in the recording may not be waited for"


def test_the_short_branch_of_a_block_has_a_stream_where_maps_are_small(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = C3k(16).train(), torch.rand(2, 16, 8, 8)
    with recorded(DEVICE), Watched(gpu), torch.autocast("cpu", dtype=torch.bfloat16):
        gpu.does([], [x])
        block(x).sum()
        aside = gpu.streams.pop(beside.ASIDE)
        assert 0 < aside.started == gpu.main.seen[aside.name]
        assert aside.seen["main"] == 1, "not after the deep branch"
        assert {(x.data_ptr(), aside.name)} <= set(gpu.lent)
    monkeypatch.setattr(beside, "_SMALL_BYTES", 4 * x.numel() - 1)
    with recorded(DEVICE), Watched(gpu), torch.autocast("cpu", dtype=torch.bfloat16):
        block(x).sum()
        assert not gpu.streams[beside.ASIDE].started


def test_a_block_lets_the_notes_of_others_be(gpu: Gpu) -> None:
    """Maps that the head takes are there before the last blocks."""
    level = torch.rand(1, 4)
    with recorded(DEVICE):
        note_made(level)
        C3k(16).train()(torch.rand(2, 16, 8, 8))
        gpu.main.started = 90
        with apart(0, level):
            assert gpu.current.seen["main"] < 90
        together({0: level})
        assert not beside._made


def test_a_whole_network_takes_notes_of_what_its_head_takes(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[Any] = []
    monkeypatch.setattr("paceline.models.graph.note_made", lambda value: (noted.append(value.shape), note_made(value)))
    with Watched(gpu), torch.autocast("cpu", dtype=torch.bfloat16):
        build_model("yolo11n", 3).train()(torch.rand(2, 3, 64, 64))
    assert noted == [(2, 64, 8, 8), (2, 128, 4, 4), (2, 256, 2, 2)]
    at = [gpu.streams[number].seen["main"] for number in range(3)]
    assert at[0] < at[1] < at[2]


def gradient(weight: Tensor, x: Tensor, of_y: Tensor, *, joins: bool = True) -> Tensor:
    settings = ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    _, of_weight = gradients_apart(of_y, x, weight, settings, (True, True), joins=joins)
    assert of_weight is not None
    return of_weight


def test_gradients_of_weights_come_beside_and_are_read_after_the_wait(gpu: Gpu) -> None:
    weight, x, of_y = torch.rand(3, 2, 1, 1), torch.rand(1, 2, 4, 4), torch.rand(1, 3, 4, 4)
    with Watched(gpu):
        gpu.does([], [x, of_y])
        found = gradient(weight, x, of_y)
        assert gpu.streams[-1].seen["main"] == 1, "not for the gradient of the map"
        assert gpu.main.started == 2
        (read,) = beside._read
        assert read.stream is gpu.main
        assert {value.data_ptr() for value in read.values} >= {x.data_ptr(), of_y.data_ptr()}
        with pytest.raises(AssertionError, match="may not have written"):
            found.sum()
        rejoin(DEVICE, [found])
        assert not beside._read
        assert (found.data_ptr(), "main") in gpu.lent
        torch.testing.assert_close(found.sum(), torch.einsum("bohw,bihw->oi", of_y, x).sum())


def test_a_gradient_that_lies_unevenly_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By those who know that it is read twice."""
    read: list[Tensor] = []
    convolve = torch.ops.aten.convolution_backward

    def noted(of_y: Tensor, *given: Any) -> Any:
        read.append(of_y)
        return convolve(of_y, *given)

    x = torch.rand(2, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    weight, wide = torch.rand(3, 2, 1, 1), torch.rand(2, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    found, _ = torch.chunk(wide, 2, dim=1)
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", noted)
    of_weight = gradient(weight, x, found, joins=False)
    torch.testing.assert_close(of_weight[:, :, 0, 0], torch.einsum("bohw,bihw->oi", found, x))
    assert read[0] is read[1]
    assert read[0].is_contiguous(memory_format=torch.channels_last)


def test_what_no_node_waits_for_stays_in_order(gpu: Gpu) -> None:
    weight, x, of_y = torch.rand(3, 2, 1, 1), torch.rand(1, 2, 4, 4), torch.rand(1, 3, 4, 4)
    with Watched(gpu):
        gradient(weight, x, of_y, joins=False).sum()
    assert not gpu.streams
    assert not beside._read


def test_what_one_stream_has_lent_another_does_not_give_back(gpu: Gpu) -> None:
    """A branch waits for its own gradients; those that the main stream's are made of are still read."""
    weight, x, of_y = torch.rand(3, 2, 1, 1), torch.rand(1, 2, 4, 4), torch.rand(1, 3, 4, 4)
    gradient(weight, x, of_y)
    branch = gpu.stream_of(DEVICE, 0)
    with gpu.on(branch):
        gradient(weight, x, of_y)
        rejoin(DEVICE, [])
    assert [read.stream for read in beside._read] == [gpu.main]
    rejoin(DEVICE, [])
    assert not beside._read


def test_no_more_is_held_than_there_is_room_for(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is waited for, by the stream that goes on and by the one whose memory it is; the latest never is."""
    weight, x, of_y = torch.rand(3, 2, 1, 1), torch.rand(1, 2, 4, 4), torch.rand(1, 3, 4, 4)
    each = 4 * (weight.numel() + x.numel() + of_y.numel())
    monkeypatch.setattr(beside, "_room_on", lambda device: 2 * each)
    branch = gpu.stream_of(DEVICE, 0)
    with Watched(gpu):
        with gpu.on(branch):
            gradient(weight, x, of_y)
        done = gpu.streams[-1].started
        gradient(weight, x, of_y)
        assert [read.stream for read in beside._read] == [branch, gpu.main]
        assert "-1" not in branch.seen | gpu.main.seen
        gradient(weight, x, of_y)
    assert [read.stream for read in beside._read] == [gpu.main, gpu.main]
    assert branch.seen["-1"] == gpu.main.seen["-1"] == done < gpu.streams[-1].started
    monkeypatch.setattr(beside, "_room_on", lambda device: 0)
    gradient(weight, x, of_y)
    assert len(beside._read) == 1
    rejoin(DEVICE, [])
    assert not beside._read


class Beside(torch.autograd.Function):
    """A weight's gradient, computed beside."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight * 2

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> Tensor:
        with beside.beside(of_y, joins=True):
            return of_y * 2


@pytest.mark.parametrize("which", ["half", "whole", "both"])
def test_a_node_waits_before_it_hands_its_gradients_on(gpu: Gpu, which: str) -> None:
    unit: nn.Module = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False)).train()
    weight: Any = unit[0].weight  # type: ignore[index]
    with torch.autocast("cpu", dtype=torch.bfloat16), half_weights.halved(unit):
        half, whole = half_weights.half_of(weight, torch.bfloat16), half_weights.whole_of(weight)
        taken = {"half": [half], "whole": [whole], "both": [half, whole]}[which]
    assert half_weights.half_of(weight, torch.bfloat16) is weight
    assert half_weights.whole_of(weight) is weight
    assert whole.dtype == torch.float32
    total = sum((Beside.apply(value).float().sum() for value in taken), torch.zeros(()))  # type: ignore[no-untyped-call]
    with Watched(gpu):
        total.backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 2.0 * len(taken)))
    assert gpu.main.seen["-1"] == gpu.streams[-1].started == len(taken)
    assert not beside._read


def test_a_gradient_that_goes_to_the_weight_itself_stays_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another type than its node has rounded it to, a convolution takes its weight as it is."""
    unit, given = Convolution(8, 8, 3, groups=8).train(), []

    def convolved(x: Tensor, weight: Tensor, dtype: torch.dtype, *, joins: bool) -> Tensor:
        given.append((weight is unit.weight, joins))
        return x

    monkeypatch.setattr(Convolution, "_has_kernels", lambda unit, x, dtype: True)
    for name in ("depthwise_conv", "narrow_conv"):  # which need Triton
        monkeypatch.setattr(paceline.models.operations, name, SimpleNamespace(convolved=convolved), raising=False)
    with torch.autocast("cpu", dtype=torch.bfloat16), half_weights.halved(unit):
        unit(torch.rand(1, 8, 4, 4))
        with torch.autocast("cpu", dtype=torch.float16):
            unit(torch.rand(1, 8, 4, 4))
    unit(torch.rand(1, 8, 4, 4))
    assert given == [(False, True), (True, False), (True, False)]


def test_running_statistics_move_beside_the_backward_pass(gpu: Gpu) -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).train()
    statistics = BatchStatistics(network)
    running = network[1].running_mean
    with Watched(gpu):
        with statistics.part():
            y = network(torch.rand(4, 2, 3, 3))
        forward = gpu.main.started
        y.sum().backward()
        assert gpu.main.started > forward
        statistics.commit()
        assert gpu.streams[beside.OF_STATISTICS].seen["main"] == forward
        assert isinstance(running, torch.Tensor)
        assert float(running.abs().sum()) > 0, "which the main stream may read now"
    assert not beside._made


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 PiB")


def breaks_off(gpu: Gpu) -> None:
    """Start something on each kind of stream, and run out of memory before it is waited for."""
    x, weight, of_y = torch.rand(1, 2, 4, 4), torch.rand(3, 2, 1, 1), torch.rand(1, 3, 4, 4)
    note_made(x)
    with apart(0, x):
        gradient(weight, x, of_y)
    gradient(weight, x, of_y)
    assert beside._read
    assert beside._made
    raise OUT_OF_MEMORY


def test_a_recording_that_breaks_off_comes_together_and_holds_nothing(gpu: Gpu) -> None:
    with Watched(gpu), pytest.raises(torch.OutOfMemoryError), recorded(DEVICE):
        breaks_off(gpu)
    assert set(gpu.streams) == {0, -1}
    assert all(gpu.main.knows(stream.name, stream.started) for stream in gpu.streams.values())
    assert not any((beside._read, beside._made, beside._taken))


def test_a_recording_waits_for_no_stream_that_is_not_of_it(gpu: Gpu) -> None:
    with recorded(DEVICE), apart(3, torch.rand(1)):
        pass
    assert gpu.main.seen == {}, "what is whole has come together by itself"
    with pytest.raises(torch.OutOfMemoryError), recorded(DEVICE):
        breaks_off(gpu)
    assert set(gpu.main.seen) - {"main"} == {"0", "-1"}


def test_a_recording_the_device_has_given_up_tells_what_went_wrong(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(stream: Stream, other: Stream) -> None:
        if stream is gpu.main:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(Stream, "wait_stream", refuses)
    with pytest.raises(torch.OutOfMemoryError), recorded(DEVICE):
        breaks_off(gpu)
    assert not any((beside._read, beside._made, beside._taken))


def test_what_is_noted_before_an_update_is_complete_is_not_held(gpu: Gpu) -> None:
    """The parts of such a batch are counted, and nobody moves the running statistics."""
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).train()
    statistics = BatchStatistics(network)
    with recorded(DEVICE), statistics.part():
        network(torch.rand(4, 2, 3, 3))
    assert not beside._made


def test_a_recording_ends_when_all_its_streams_have_come_together(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def graph(*given: Any, stream: Stream, **others: Any) -> Iterator[None]:
        try:
            with gpu.on(stream):
                yield
        finally:
            unjoined = [other for other in gpu.streams.values() if not stream.knows(other.name, other.started)]
            if unjoined:
                raise RuntimeError("CUDA error: capturing stream has unjoined work")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: Stream(gpu, "recording"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    capture = CudaCapture(DEVICE)
    with Watched(gpu), pytest.raises(torch.OutOfMemoryError):
        capture.record(lambda: breaks_off(gpu))
    assert not any((beside._read, beside._made, beside._taken))


def test_branches_write_where_their_points_are_joined_once_that_memory_is_theirs(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of the first branch's stream, which may still use what was there before; nobody waits for the neck."""
    waited: list[tuple[str, int]] = []
    there: list[int] = []

    def ended(x: Tensor, weight: Tensor, bias: Tensor, joined: Tensor, first: int) -> Tensor:
        made_by, count, _ = gpu.written[joined.data_ptr()]
        assert gpu.current.knows(made_by, count)
        assert (joined.data_ptr(), gpu.current.name) in gpu.lent
        waited.append((made_by, gpu.current.seen["main"]))
        return torch.nn.functional.conv2d(x, weight, bias).flatten(2).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "paceline.models.operations.fused_ends", SimpleNamespace(ended=ended))
    monkeypatch.setattr(ends, "takes_map", lambda x: True)
    torch.manual_seed(0)
    head = DetectionHead((16, 32, 64), 3, depthwise=True).train()
    levels = []
    with Watched(gpu), torch.autocast("cpu", dtype=torch.bfloat16):
        for number, (channels, side) in enumerate(((16, 8), (32, 4), (64, 2))):
            levels.append(torch.rand(2, channels, side, side))
            note_made(levels[-1])
            there.append(gpu.main.started)
            gpu.main.started += 100 * (number + 1)  # the neck goes on
        outputs = head(*levels)
        sum(output.sum() for output in outputs)
    assert waited == [(first, begin) for first in ("0", "3") for begin in there]
    assert not beside._made


def test_a_bias_whose_gradient_a_kernel_sums_is_waited_for(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    unit: nn.Module = nn.Sequential(nn.Conv2d(2, 3, 1)).train()
    bias: Any = unit[0].bias  # type: ignore[index]
    with torch.autocast("cpu", dtype=torch.bfloat16), half_weights.halved(unit):
        whole = half_weights.whole_of(bias)
    assert whole is not bias
    with Watched(gpu):
        Beside.apply(whole).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(bias.grad, torch.full_like(bias, 2.0))
    assert gpu.main.seen["-1"] == gpu.streams[-1].started == 1
    monkeypatch.setattr(half_weights, "on_gpu", lambda values: False)
    with torch.autocast("cpu", dtype=torch.bfloat16), half_weights.halved(unit):
        assert half_weights.whole_of(bias) is bias, "which a CPU takes as it is"
