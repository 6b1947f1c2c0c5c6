"""Kernels compiled before a step: what is named for compilation, once, and never a failure."""

from __future__ import annotations

import inspect
import shutil
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from additions import Additions

from paceline import triton_kernels
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.training import ahead

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from paceline.models.graph import DetectionModel

KERNELS = {
    *(
        "_statistics",
        "_join_moments",
        "_settle_statistics",
        "_apply",
        "_gradient_sums",
        "_settle_sums",
        "_apply_gradient",
    ),
    *("_spread", "_convolve", "_multiply", "_settle", "_multiply_end", "_end_parts"),
    *("_convolve_narrow", "_convolve_cells", "_map_gradient", "_weight_gradient", "_trace_back"),
    *("_convolve_joint", "_piece_gradients", "_weight_parts", "_settle_weight"),
    *("_pool", "_pool_gradient", "_double", "_halve"),
    *("_convert", "_note", "_multiply", "_squares", "_settle", "_descend", "_count", "_adapt", "_approach", "_copy"),
    *("_decode", "_claim", "_pick", "_contest", "_target"),
    *("_sum_slots", "_sum_softplus", "_add_up", "_fill_gradients", "_slot_gradients"),
}


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """Collect what is named for compilation; nothing is compiled."""
    jit = pytest.importorskip("triton.runtime.jit")
    found: list[tuple[str, list[Any], dict[str, Any]]] = []
    monkeypatch.setattr(
        jit.JITFunction,
        "warmup",
        lambda kernel, *given, grid, **options: found.append(
            (kernel.fn.__name__, list(given), {"grid": grid} | options)
        ),
    )
    as_on_a_gpu(monkeypatch)
    return found


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let autocast be entered, as it can be where there is a GPU."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)


def network_of(name: str = "yolo11n") -> tuple[DetectionModel, DetectionLoss]:
    torch.manual_seed(0)
    return build_model(name, 3), DetectionLoss(LossConfig(), 3)


def test_an_imagined_step_names_every_kernel_and_touches_nothing(
    named: list[tuple[str, list[Any], dict[str, Any]]],
) -> None:
    network, criterion = network_of()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with triton_kernels.compiled_ahead(1):
        ahead.imagined_step(network, criterion, torch.bfloat16)
    assert {name for name, _, _ in named} == KERNELS
    tensors = [value for _, given, _ in named for value in given if isinstance(value, torch.Tensor)]
    assert all(value.is_meta for value in tensors)
    assert not {value.dtype for value in tensors} & {torch.float16, torch.float64}
    counts = Counter(name for name, _, _ in named)
    assert counts["_apply"] == counts["_settle_statistics"] == 81, "one for each norm"
    assert counts["_apply_gradient"] == 80, "the first convolution makes the gradient of its result on the way"
    assert counts["_statistics"] == 81 - 32, "without those whose convolutions have written their moments"
    assert counts["_convolve"] + counts["_convolve_joint"] == 1 + 16
    assert counts["_join_moments"] == 9, "of maps of 80 x 80 cells and more, but for those that go in strips"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(value.grad is None for value in network.parameters())


def test_the_imagined_map_and_weights_have_the_types_of_a_step_under_autocast(
    named: list[tuple[str, list[Any], dict[str, Any]]],
) -> None:
    network, criterion = network_of()
    with triton_kernels.compiled_ahead(1):
        ahead.imagined_step(network, criterion, torch.float16)
    y, kept, weight, bias = next(given for name, given, _ in named if name == "_apply")[:4]
    assert (y.dtype, kept.dtype, weight.dtype, bias.dtype) == (torch.float16, *[torch.float32] * 3)
    weight, bands = next(given for name, given, _ in named if name == "_spread")[:2]
    assert (weight.dtype, bands.dtype) == (torch.float32, torch.float16)


@pytest.mark.parametrize(("name", "additions"), [("yolo11n", 2), ("yolo11m", 2), ("yolo11l", 4), ("yolov8m", 0)])
def test_gradients_of_maps_are_added_by_norms(
    named: list[tuple[str, list[Any], dict[str, Any]]], name: str, additions: int
) -> None:
    """All but two in each attention: positions, which come beside the rest, and the gradients of values."""
    network, criterion = network_of(name)
    with triton_kernels.compiled_ahead(1), Additions() as found:
        ahead.imagined_step(network, criterion, torch.bfloat16)
    assert found.count == additions


def test_no_kernel_is_compiled_for_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles anew for types, constants, and numbers that are 1 or multiples of 16, if not told not to."""
    jit = pytest.importorskip("triton.runtime.jit")
    found: set[tuple[Any, ...]] = set()

    def kind(value: Any, parameter: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(each, parameter) for each in value)
        if isinstance(value, torch.Tensor):
            return value.dtype
        if parameter.is_constexpr or not isinstance(value, int):
            return value
        return "any" if parameter.do_not_specialize else (value == 1, value % 16 == 0)

    def warmup(kernel: Any, *given: Any, grid: Any, **options: Any) -> None:
        values = dict(zip(kernel.arg_names, given, strict=False)) | options
        kinds = [kind(values.get(parameter.name, parameter.default), parameter) for parameter in kernel.params]
        found.add((kernel.fn.__module__, kernel.fn.__name__, *kinds, options.get("num_warps")))

    monkeypatch.setattr(jit.JITFunction, "warmup", warmup)
    as_on_a_gpu(monkeypatch)
    network, criterion = network_of()
    sizes = ((ahead._IMAGES, ahead._SIDE), (2, 640), (15, 672), (3, 320), (128, 640), (32, 1280), (2, 64))
    with triton_kernels.compiled_ahead(1):
        ahead.imagined_odd_loss(network, criterion, torch.bfloat16)
        for images, side in sizes:
            ahead.imagined_step(network, criterion, torch.bfloat16, images=images, side=side)
            if (images, side) == sizes[0]:
                foreseen = set(found)
    assert sorted(map(str, found - foreseen)) == []


def test_a_kernel_that_cannot_be_compiled_stops_nothing_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    modes = pytest.importorskip("triton.runtime._async_compile")
    tried: list[int] = []

    def broken() -> None:
        tried.append(1)
        raise RuntimeError("no assembler")

    def warmup(kernel: Any, *given: Any, grid: Any, **options: Any) -> None:
        mode = modes.active_mode.get()
        after = [lambda *_: pytest.fail("it was not compiled"), lambda *_: None]  # when it is, and in the end
        mode.submit(len(tried), broken, *after[: len(inspect.signature(mode.submit).parameters) - 2])

    monkeypatch.setattr(jit.JITFunction, "warmup", warmup)
    as_on_a_gpu(monkeypatch)
    network, criterion = network_of()
    with triton_kernels.compiled_ahead(1):
        ahead.imagined_step(network, criterion, torch.bfloat16)
    assert tried
    assert modes.active_mode.get() is None
    assert not triton_kernels.usable(torch.device("meta"))


def test_meta_is_no_device_for_kernels_else() -> None:
    assert not triton_kernels.usable(torch.device("meta"))
    assert not triton_kernels.on_gpu(torch.empty(1, device="meta"))


class Elsewhere:
    """A network that says that it is on a GPU."""

    name, num_classes = "imagined", 3

    def parameters(self) -> Iterator[Any]:
        yield type("Weight", (), {"device": torch.device("cuda", 0)})()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[torch.dtype]:
    """Types of the steps that are imagined, as on a GPU with a new cache; in float16 there is no compiler."""
    pytest.importorskip("triton")
    steps: list[torch.dtype] = []

    @contextmanager
    def at_once(threads: int) -> Iterator[None]:
        assert threads > 0
        yield

    def imagined(network: Any, criterion: Any, amp_dtype: torch.dtype) -> None:
        steps.append(amp_dtype)
        if amp_dtype is torch.float16:
            raise RuntimeError("no compiler")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(ahead, "usable", lambda device: True)
    monkeypatch.setattr(ahead, "compiled_ahead", at_once)
    monkeypatch.setattr(ahead, "imagined_step", imagined)
    monkeypatch.setattr(ahead, "imagined_odd_loss", lambda *given: None)
    monkeypatch.setattr(ahead, "_done", set())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return steps


def compile_for(*dtypes: torch.dtype | None, network: Any = None) -> None:
    for dtype in dtypes:
        ahead.compile_ahead(network or Elsewhere(), None, dtype)  # type: ignore[arg-type]


def test_once_for_a_network_and_never_a_failure(
    steps: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(ahead, "_TOLD_S", -1.0)
    with caplog.at_level("INFO", logger="paceline"):
        compile_for(torch.bfloat16, torch.bfloat16, None, torch.float16, torch.float16)
    assert steps == [torch.bfloat16, torch.float16]
    assert [record.message for record in caplog.records if "Kernels for imagined were compiled" in record.message]
    ahead.compile_ahead(*network_of(), torch.bfloat16)
    assert len(steps) == 2, "not on a CPU"


def test_a_later_process_does_nothing_where_all_is_in_the_cache_of_triton(
    steps: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def later_process(*dtypes: torch.dtype, network: Any = None) -> int:
        ahead._done.clear()
        steps.clear()
        compile_for(*dtypes, network=network)
        return len(steps)

    both = (torch.bfloat16, torch.float16)
    assert later_process(*both) == 2
    assert later_process(*both) == 1, "what failed is tried again"
    other = Elsewhere()
    other.num_classes = 4
    assert later_process(torch.bfloat16, network=other) == 1
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert later_process(torch.bfloat16) == 1
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    assert later_process(torch.bfloat16) == 1
    assert later_process(torch.bfloat16) == 0
    shutil.rmtree(tmp_path / "triton")
    assert later_process(torch.bfloat16) == 1, "the mark went with the kernels"
    monkeypatch.setattr(ahead, "digest_of_package", lambda: "of another version")
    assert later_process(torch.bfloat16) == 1


def test_a_cache_that_cannot_be_written_stops_nothing(
    steps: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "triton"))
    compile_for(torch.bfloat16)
    ahead._done.clear()
    compile_for(torch.bfloat16)
    assert len(steps) == 2
