"""A step that ran out of memory goes on in micro-batches, as if it had begun with them."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from batches import NUM_CLASSES, make_batch
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import UserError
from paceline.ledger import Ledger
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.parallel.exhaustion import is_out_of_memory
from paceline.parallel.micro import MicroBatches, divide
from paceline.parallel.single import SingleEngine

if TYPE_CHECKING:
    from torch import Tensor, nn

    from paceline.batch import Batch

OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 PiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("std::bad_alloc"),
)


class Noisy(torch.nn.Module):
    """A network in float64 that draws a random number for every batch, as dropout would."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.double()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.inner(images.double() * (1 + 0.001 * torch.rand(1, dtype=torch.float64)))
        return outputs


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """yolo11n in training, with the statistics of real activations."""
    torch.manual_seed(0)
    made = build_model("yolo11n", NUM_CLASSES).train()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        made(make_batch(8, seed=1).network_input())
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.03
    return Noisy(made)


class Memory:
    """Room for so many images at a place of the step, on every call from the `first` on; counts the failures."""

    def __init__(self, room: int, *, first: int = 1, error: BaseException = OUT_OF_MEMORY[0]) -> None:
        self.room, self.first, self.error = room, first, error
        self.calls = self.failures = 0

    def take(self, images: int) -> None:
        self.calls += 1
        if self.calls >= self.first and images > self.room:
            self.failures += 1
            raise self.error


def fail_in_forward(engine: SingleEngine, memory: Memory, node: str) -> None:
    module = engine.network.get_submodule(node)
    module.register_forward_pre_hook(lambda module, inputs: memory.take(len(inputs[0])))


def fail_in_backward(engine: SingleEngine, memory: Memory, node: str) -> None:
    module = engine.network.get_submodule(node)

    def watch(module: nn.Module, inputs: object, output: Tensor) -> None:
        images = len(output)
        output.register_hook(lambda gradient: memory.take(images))

    module.register_forward_hook(watch)


def fail_in_loss(engine: SingleEngine, memory: Memory, node: str) -> None:
    inner = engine._criterion

    def criterion(predictions: tuple[Tensor, ...], batch: Batch) -> object:
        memory.take(len(batch))
        return inner(predictions, batch)

    engine._criterion = criterion  # type: ignore[assignment]


PLACES = {
    "forward, first node": (fail_in_forward, "inner.model.0"),
    "forward, in the middle": (fail_in_forward, "inner.model.10.m.0"),
    "forward, last norm": (fail_in_forward, "inner.model.23.cv3.2.1.1.bn"),
    "loss": (fail_in_loss, ""),
    "backward, at once": (fail_in_backward, "inner.model.22"),
    "backward, in the middle": (fail_in_backward, "inner.model.9"),
    "backward, at the end": (fail_in_backward, "inner.model.0.conv"),
}


def single(network: nn.Module, *, loss_scale: float = 1.0) -> SingleEngine:
    criterion = DetectionLoss(LossConfig(), NUM_CLASSES)
    return SingleEngine(network, criterion, amp_dtype=None, clip=0.0, ledger=Ledger(), loss_scale=loss_scale)


def state(engine: SingleEngine | MicroBatches) -> dict[str, Tensor]:
    """Everything that a step may change, apart from what it returns."""
    network = engine.network.state_dict()
    gradients = {f"grad.{name}": value.grad for name, value in engine.network.named_parameters()}
    pending = {f"pending.{name}": value for name, value in engine.pending().items()}
    random = {"random": torch.get_rng_state()}
    found = network | gradients | pending | random
    return {name: value.detach().clone() for name, value in found.items() if value is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def micro_from_the_start(engine: SingleEngine, batches: list[Batch], size: int) -> list[float]:
    """The slow reference: an engine that never hears of whole batches. Returns the loss of each."""
    totals = []
    for batch in batches:
        parts = [batch.rows(k, k + size) for k in range(0, len(batch), size)]
        sums = [engine.accumulate(part, share=len(part) / len(batch)) for part in parts]
        totals.append(float(sum(part.total for part in sums)))
    return totals


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("updates_in_window", [1, 3])
def test_a_failed_step_leaves_no_trace(network: nn.Module, place: str, updates_in_window: int) -> None:
    """The last batch of a window fails twice; everything is as if all of the window had been cut from the start."""
    batches = [make_batch(8, seed=seed) for seed in range(updates_in_window)]
    expected = single(copy.deepcopy(network))
    torch.manual_seed(5)
    losses = micro_from_the_start(expected, batches, 2)

    engine = MicroBatches(single(copy.deepcopy(network)))
    fail, node = PLACES[place]
    memory = Memory(room=2, first=updates_in_window)
    fail(engine.inner, memory, node)
    torch.manual_seed(5)
    totals = [float(engine.accumulate(batch, completes=batch is batches[-1]).total) for batch in batches]
    assert memory.failures == 2
    assert totals[-1] == pytest.approx(losses[-1], rel=1e-12)
    assert_equal(state(engine), state(expected))
    assert engine.gradient() == expected.gradient() == 0.0
    assert_equal(state(engine), state(expected))


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: f"{type(error).__name__}-{error}"[:30])
def test_every_word_for_exhausted_memory_is_understood(network: nn.Module, error: BaseException) -> None:
    engine = MicroBatches(single(copy.deepcopy(network)))
    memory = Memory(room=2, error=error)
    fail_in_forward(engine.inner, memory, "inner.model.3")
    engine.accumulate(make_batch(4))
    assert memory.failures == 1


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shape mismatch"), KeyboardInterrupt()], ids=repr)
def test_another_failure_passes_through(network: nn.Module, error: BaseException) -> None:
    engine = MicroBatches(single(copy.deepcopy(network)))
    memory = Memory(room=2, error=error)
    fail_in_backward(engine.inner, memory, "inner.model.3")
    with pytest.raises(type(error)) as caught:
        engine.accumulate(make_batch(4))
    assert caught.value is error
    assert memory.calls == 1
    assert not is_out_of_memory(error)


def test_later_batches_start_where_it_fitted(network: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    engine = MicroBatches(single(copy.deepcopy(network)))
    memory = Memory(room=3)
    fail_in_forward(engine.inner, memory, "inner.model.0")
    with caplog.at_level(logging.WARNING, "paceline"):
        for seed in range(3):
            engine.accumulate(make_batch(8, seed=seed))
            engine.gradient()
    assert memory.failures == 2
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("Out of memory with 8 images of 64 px: this step and the next ones go in micro-batches")
    assert "batch=2 (and nbs to 8 or more" in message


def test_smaller_pictures_are_not_cut_as_finely(network: nn.Module) -> None:
    engine = MicroBatches(single(copy.deepcopy(network)))
    sizes: list[int] = []
    engine.network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    fail_in_forward(engine.inner, Memory(room=4), "inner.model.0")
    engine.accumulate(make_batch(8, size=128))
    engine.gradient()
    sizes.clear()
    engine.accumulate(make_batch(8, size=64))
    assert sizes == [8, 4, 4]  # 8 of 64 px are as many pixels as 2 of 128 px; the injected failure counts images
    sizes.clear()
    engine.gradient()
    engine.accumulate(make_batch(8, size=128))
    assert sizes == [1] * 8


def test_it_gives_up_at_one_image(network: nn.Module) -> None:
    engine = MicroBatches(single(copy.deepcopy(network)))
    memory = Memory(room=0)
    fail_in_backward(engine.inner, memory, "inner.model.5")
    with pytest.raises(UserError, match=r"does not even fit .* with 1 image of 64 x 64 px; take a smaller imgsz or"):
        engine.accumulate(make_batch(6))
    assert memory.failures == 4  # 6, 3, 2 and 1


def test_no_part_leaves_norms_a_single_value(network: nn.Module) -> None:
    engine = MicroBatches(single(copy.deepcopy(network)))
    sizes: list[int] = []
    engine.network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    memory = Memory(room=3)
    fail_in_forward(engine.inner, memory, "inner.model.0")
    engine.accumulate(make_batch(5, size=32))
    assert sizes == [5, 3, 2]
    memory.room = 2
    with pytest.raises(UserError, match="with 3 images of 32 x 32 px"):
        engine.accumulate(make_batch(5, size=32))


def test_gradients_are_those_of_the_whole_batch(network: nn.Module) -> None:
    """With norms in evaluation, which see no batch; random numbers are the same for all here."""
    calm = copy.deepcopy(network).inner.eval()

    class InDouble(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = calm

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            outputs: tuple[Tensor, ...] = self.inner(images.double())
            return outputs

    frozen = InDouble()
    batches = [make_batch(6, seed=seed) for seed in range(2)]
    whole = single(copy.deepcopy(frozen))
    for batch in batches:
        whole.accumulate(batch)
    whole.gradient()
    engine = MicroBatches(single(copy.deepcopy(frozen)))
    fail_in_backward(engine.inner, Memory(room=2, first=2), "inner.model.7")
    for batch in batches:
        engine.accumulate(batch, completes=batch is batches[-1])
    engine.gradient()
    pairs = [
        (found.grad, expected.grad)
        for found, expected in zip(engine.network.parameters(), whole.network.parameters(), strict=True)
        if found.grad is not None and expected.grad is not None
    ]
    size = torch.linalg.vector_norm(torch.stack([expected.norm() for _, expected in pairs]))
    assert len(pairs) > 100
    assert all((found - expected).norm() <= 1e-10 * size for found, expected in pairs)


def test_running_statistics_are_the_mean_of_the_parts(network: nn.Module) -> None:
    """Decision 31, for the first norm, whose input does not depend on any other."""
    torch.manual_seed(3)
    engine = MicroBatches(single(copy.deepcopy(network)))
    fail_in_forward(engine.inner, Memory(room=2), "inner.model.4")
    seen: list[Tensor] = []
    first = engine.network.get_submodule("inner.model.0")
    first.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    before = first.bn.running_mean.clone()
    engine.accumulate(make_batch(4))
    engine.gradient()
    parts = [output.mean((0, 2, 3)) for output in seen if len(output) == 2]
    assert len(parts) == 2
    expected = before + first.bn.momentum * (torch.stack(parts).mean(0) - before)
    assert torch.allclose(first.bn.running_mean, expected, rtol=1e-12, atol=1e-14)
    assert first.bn.num_batches_tracked == 2  # one when the fixture was made, one update


@pytest.mark.parametrize("loads", ["before", "after a window was begun"])
def test_what_was_pending_when_it_began_is_kept(network: nn.Module, loads: str) -> None:
    first, second = make_batch(4, seed=1), make_batch(4, seed=2)
    torch.manual_seed(7)
    expected = single(copy.deepcopy(network))
    expected.accumulate(first)
    pending = {name: value.clone() for name, value in expected.pending().items()}
    place = torch.get_rng_state()
    micro_from_the_start(expected, [second], 2)

    engine = MicroBatches(single(copy.deepcopy(network)))
    if loads != "before":
        engine.accumulate(make_batch(2, seed=3), completes=False)
        engine.inner.drop()
    engine.load_pending(pending)
    fail_in_backward(engine.inner, Memory(room=2), "inner.model.0.conv")
    torch.set_rng_state(place)
    engine.accumulate(second)
    assert_equal(state(engine), state(expected))


def test_what_came_past_it_is_kept(network: nn.Module) -> None:
    """As batches do that a graph has run."""
    batches = [make_batch(4, seed=seed) for seed in range(3)]
    torch.manual_seed(7)
    expected = single(copy.deepcopy(network))
    for batch in batches[:2]:
        expected.accumulate(batch)
    micro_from_the_start(expected, batches[2:], 1)

    engine = MicroBatches(single(copy.deepcopy(network)))
    torch.manual_seed(7)
    engine.accumulate(batches[0], completes=False)
    with engine.unwatched():
        engine.inner.accumulate(batches[1])
    fail_in_backward(engine.inner, Memory(room=1), "inner.model.0.conv")  # fails twice: the copy serves twice
    engine.accumulate(batches[2])
    assert_equal(state(engine), state(expected))


def test_an_update_past_it_ends_the_window(network: nn.Module) -> None:
    """A window was begun, a graph has finished it and begun the next one."""
    batches = [make_batch(4, seed=seed) for seed in range(4)]
    torch.manual_seed(7)
    expected = single(copy.deepcopy(network))
    for batch in batches[:2]:
        expected.accumulate(batch)
    expected.gradient()
    expected.network.zero_grad()
    expected.accumulate(batches[2])
    micro_from_the_start(expected, batches[3:], 2)

    engine = MicroBatches(single(copy.deepcopy(network)))
    torch.manual_seed(7)
    engine.accumulate(batches[0], completes=False)
    with engine.unwatched():
        engine.inner.accumulate(batches[1])
        engine.inner.gradient()
        engine.network.zero_grad()
        engine.inner.accumulate(batches[2])
    fail_in_forward(engine.inner, Memory(room=2), "inner.model.0")
    engine.accumulate(batches[3])
    assert_equal(state(engine), state(expected))


def test_it_stands_aside_where_nobody_watches(network: nn.Module) -> None:
    """A recording that fails is its recorder's to mend, also where micro-batches are known to be needed."""
    engine = MicroBatches(single(copy.deepcopy(network)))
    memory = Memory(room=2)
    fail_in_forward(engine.inner, memory, "inner.model.0")
    with engine.unwatched(), pytest.raises(torch.OutOfMemoryError):
        engine.accumulate(make_batch(4))
    engine.inner.drop()
    assert memory.calls == 1
    engine.accumulate(make_batch(4))  # whole, which fails, then two by two
    assert memory.calls == 4
    with engine.unwatched():
        engine.accumulate(make_batch(4))
    assert memory.calls == 6
    memory.room = 1
    with engine.unwatched(), pytest.raises(torch.OutOfMemoryError):
        engine.accumulate(make_batch(4))


def test_nothing_is_kept_where_every_batch_completes(network: nn.Module) -> None:
    engine = MicroBatches(single(copy.deepcopy(network)))
    for seed in range(2):
        engine.accumulate(make_batch(2, seed=seed))
        assert not engine._window.entries
        engine.gradient()
        engine.network.zero_grad()
    assert engine.pending() == {}


def test_the_loss_scale_stays(network: nn.Module) -> None:
    engine = MicroBatches(single(copy.deepcopy(network), loss_scale=64.0))
    fail_in_backward(engine.inner, Memory(room=1), "inner.model.8")
    engine.accumulate(make_batch(2))
    assert engine.inner.loss_scale.value == 64.0
    assert engine.gradient() == 0.0


@given(images=st.integers(1, 300), most=st.integers(0, 300), least=st.sampled_from([1, 2]))
def test_division(images: int, most: int, least: int) -> None:
    sizes = divide(images, most=most, least=least)
    assert sum(sizes) == images
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(least, images)
    room = max(most, 1)
    assert max(sizes) <= room or max(sizes) <= 2 * least - 1 or images <= 2 * least - 1
    assert len(sizes) == 1 or -(-images // (len(sizes) - 1)) > room  # no fewer parts would do


REAL = """
import resource, torch
from paceline.ledger import Ledger
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.parallel.micro import MicroBatches
from paceline.parallel.single import SingleEngine
from batches import NUM_CLASSES, make_batch
torch.set_num_threads(1)
network = build_model("yolo11n", NUM_CLASSES).train()
engine = MicroBatches(SingleEngine(network, DetectionLoss(LossConfig(), NUM_CLASSES), amp_dtype=None, clip=0.0,
                                   ledger=Ledger()))
engine.accumulate(make_batch(1, size=320))  # threads and libraries are there
engine.gradient()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 700_000_000, resource.RLIM_INFINITY))
sums = engine.accumulate(make_batch(16, size=320))
assert engine.gradient() == 0.0
print(engine._most_px // 320**2, bool(torch.isfinite(sums.total)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit of the address space is Linux'")
def test_a_real_limit() -> None:
    """The address space of a process is limited; 16 images of 320 px need about 1.5 GB."""
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", REAL], cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size, finite = done.stdout.split()
    assert int(size) in (1, 2, 4, 8)
    assert finite == "True"
