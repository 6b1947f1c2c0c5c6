"""Compilation by regions: equal to eager, under whatever is around it; and what happens when it fails."""

from __future__ import annotations

import copy
import logging
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import SGD, setting, tiny

from paceline.ledger import Ledger
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.fusion import fuse
from paceline.parallel.single import SingleEngine
from paceline.training.compile_cache import CompileCache, compiler_key, pack, unpack
from paceline.training.compiling import Compiler
from paceline.training.ema import Ema
from paceline.training.optim import build_optimizer
from paceline.training.schedule import Rates
from paceline.training.step import EagerStep
from paceline.training.trials import noise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from paceline.models.graph import DetectionModel

RATES = Rates(lr=0.01, bias_lr=0.01, momentum=0.9)


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_step(network: DetectionModel, criterion: Any = None) -> EagerStep:
    made = setting(network)
    engine = SingleEngine(network.train(), criterion or made.cast.criterion, amp_dtype=None, clip=10.0, ledger=Ledger())
    return EagerStep(engine, build_optimizer(SGD, network), Ema(network), Ledger())


def train(step: EagerStep, updates: int = 3, sizes: tuple[int, int] = (4, 2)) -> list[float]:
    """Take two batches to an update, of unlike size unless told otherwise."""
    batches = [noise(images, setting(tiny())) for images in sizes]
    return [
        float(step(batch, RATES, completes=completes).sums.total)
        for _ in range(updates)
        for batch, completes in zip(batches, (False, True), strict=True)
    ]


def states(step: EagerStep) -> dict[str, torch.Tensor]:
    return step.engine.network.state_dict() | {f"ema.{k}": v for k, v in step.ema.network.state_dict().items()}


def assert_equal(step: EagerStep, other: EagerStep) -> None:
    left, right = states(step), states(other)
    assert left.keys() == right.keys(), "compilation changes no name"
    for key, value in left.items():
        torch.testing.assert_close(value, right[key], rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend: str, tmp_path: Path) -> None:
    sizes = (2, 2) if backend == "inductor" else (4, 2)  # a C++ compiler takes its time for each size
    eager = make_step(tiny())
    expected = train(eager, sizes=sizes)
    compiled = make_step(tiny())
    network = compiled.engine.network
    cache = CompileCache(tmp_path, {"a": 1}) if backend == "inductor" else None
    with Compiler(cache=cache, backend=backend) as compiler:
        compiler.compile_network(network)
        kinds = {
            key: node._compiled_call_impl is not None for key, node in network.get_submodule("model").named_children()
        }
        assert kinds == {"0": True, "1": True, "2": False, "3": False, "4": True, "5": True}
        assert train(compiled, sizes=sizes) == pytest.approx(expected, rel=1e-4)
        assert compiler.failure == ""
    assert_equal(compiled, eager)


def test_the_loss_compiled_is_the_loss() -> None:
    predictions = tiny().train()(noise(2, setting(tiny())).network_input())
    batch = noise(2, setting(tiny()))
    loss = DetectionLoss(LossConfig(), 3)
    with Compiler(backend="aot_eager") as compiler:
        compiled = compiler.compile_criterion(loss)(predictions, batch)
        assert compiler.failure == ""
    expected = loss(predictions, batch)
    for name in ("box", "cls", "dfl", "normaliser"):
        torch.testing.assert_close(getattr(compiled, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    for value, other in zip(
        torch.autograd.grad(compiled.total, predictions),
        torch.autograd.grad(expected.total, predictions),
        strict=True,
    ):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4)


def test_copies_and_what_is_evaluated_are_not_compiled() -> None:
    step = make_step(tiny())
    network = step.engine.network
    with Compiler(backend="aot_eager") as compiler:
        compiler.compile_network(network)
        for copied in (copy.deepcopy(network), Ema(network).network, fuse(network)):
            assert not any(module._compiled_call_impl for module in copied.modules())
    assert not any(module._compiled_call_impl for module in network.modules()), "closed, they run as written"


def test_many_shapes_are_all_compiled() -> None:
    calls = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    network = Small()
    with Compiler(backend=counting) as compiler:
        compiler.compile_network(network)
        for images in range(1, 13):
            network(torch.zeros(images, 4))
        assert compiler.failure == ""
    assert len(calls) == 12, "torch alone would give up after eight"


def raising(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("this backend never works")


def test_a_failure_costs_speed_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    eager, failing = make_step(tiny()), make_step(tiny())
    expected = train(eager)
    with caplog.at_level(logging.WARNING, "paceline"), Compiler(backend=raising) as compiler:
        compiler.compile_network(failing.engine.network)
        assert train(failing) == pytest.approx(expected, rel=1e-6)
        assert "this backend never works" in compiler.failure
    assert_equal(failing, eager)
    assert [record.message for record in caplog.records] == [
        f"Compilation failed, so the step runs uncompiled: {compiler.failure}."
    ], "said once"


def test_a_backward_pass_that_cannot_be_compiled_fails_before_anything_ran() -> None:
    from torch._dynamo.backends.common import aot_autograd

    def forward_only(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func

        return make_boxed_func(graph.forward)

    def no_backward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        raise RuntimeError("no backward pass")

    eager, failing = make_step(tiny()), make_step(tiny())
    expected = train(eager)
    backend = aot_autograd(fw_compiler=forward_only, bw_compiler=no_backward)
    with Compiler(backend=backend) as compiler:
        compiler.compile_network(failing.engine.network)
        assert train(failing) == pytest.approx(expected, rel=1e-6)
        assert "no backward pass" in compiler.failure
    assert_equal(failing, eager)


def test_a_fault_of_the_users_own_is_not_swallowed() -> None:
    network = tiny().eval()
    with Compiler(backend="aot_eager") as compiler:
        compiler.compile_network(network)
        with pytest.raises(RuntimeError, match="channels"):
            network(torch.zeros(1, 4, 64, 64))


def test_without_a_cpp_compiler_it_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    from torch._inductor import config

    eager, failing = make_step(tiny()), make_step(tiny())
    expected = train(eager, 1)
    cache = CompileCache(tmp_path / "kept", {"a": 1})
    with config.patch({"cpp.cxx": (str(tmp_path / "nowhere"),)}), Compiler(cache=cache) as compiler:
        compiler.compile_network(failing.engine.network)
        assert train(failing, 1) == pytest.approx(expected, rel=1e-6)
        assert compiler.failure
    assert not cache.file.exists(), "a failure is not kept"
    assert compiler_key()["compiler"] == "none"


class Small(torch.nn.Module):
    """A network of one node."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.ModuleDict({"0": Scaled()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.model["0"](x)
        return y


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x * self.weight)


def compile_small(folder: Path) -> tuple[CompileCache, bool, str]:
    """One run: returns its cache, whether it began with code of an earlier run, and why it failed."""
    torch.compiler.reset()
    network, cache = Small(), CompileCache(folder, {"a": 1})
    expected = network(torch.ones(2, 4))
    with Compiler(cache=cache) as compiler:
        was_seeded = cache.is_seeded
        compiler.compile_network(network)
        output = network(torch.ones(2, 4))
        output.sum().backward()
        torch.testing.assert_close(output, expected)
    return cache, was_seeded, compiler.failure


def test_the_cache_survives_the_process_and_a_torn_one_is_dropped(tmp_path: Path) -> None:
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = [os.environ.get(name) for name in names]
    cache, was_seeded, failure = compile_small(tmp_path)
    assert (was_seeded, failure) == (False, "")
    assert [os.environ.get(name) for name in names] == before, "the process's own settings are put back"
    whole = cache.file.read_bytes()
    assert compile_small(tmp_path)[1:] == (True, "")
    assert cache.file.read_bytes() == whole, "nothing new, nothing written"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for torn in (whole[: len(whole) // 2], bytes(flipped), b"", b"something else"):
        cache.file.write_bytes(torn)
        cache.file.chmod(0o600)
        with CompileCache(tmp_path, {"a": 1}) as opened:
            assert not opened.is_seeded
            assert opened._folder is not None
            assert list(opened._folder.iterdir()) == []
        assert not cache.file.exists()
    assert compile_small(tmp_path)[1:] == (False, "")
    assert compile_small(tmp_path)[1:] == (True, "")


def test_code_that_was_kept_broken_is_compiled_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, _, _ = compile_small(tmp_path / "kept")
    unpack(cache.file.read_bytes(), tmp_path / "folder")
    objects = list((tmp_path / "folder").rglob("*.so"))
    assert objects, "what a C++ compiler has made is kept too"
    for path in objects:
        path.write_bytes(path.read_bytes()[:100])
    cache.file.write_bytes(pack(tmp_path / "folder"))
    with caplog.at_level(logging.WARNING, "paceline"):
        _, was_seeded, failure = compile_small(tmp_path / "kept")
    assert (was_seeded, failure) == (True, "")
    # Before 2.12 torch takes such a file for one that is missing, and compiles anew without a word.
    is_said = any("compiled anew" in record.message for record in caplog.records)
    assert is_said or torch.__version__ < "2.12"
    assert compile_small(tmp_path / "kept")[1:] == (True, "")


def test_a_file_that_others_can_write_is_not_run(tmp_path: Path) -> None:
    cache, _, _ = compile_small(tmp_path)
    cache.file.chmod(0o666)
    assert not compile_small(tmp_path)[1]


def test_a_run_that_ends_badly_keeps_nothing(tmp_path: Path) -> None:
    network, cache = Small(), CompileCache(tmp_path, {"a": 1})

    def run() -> None:
        with Compiler(cache=cache) as compiler:
            compiler.compile_network(network)
            network(torch.ones(2, 4))
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert not cache.file.exists()


def test_of_several_ranks_one_keeps(tmp_path: Path) -> None:
    network, cache = Small(), CompileCache(tmp_path, {"a": 1}, keeps=False)
    with Compiler(cache=cache) as compiler:
        compiler.compile_network(network)
        network(torch.ones(2, 4))
    assert not cache.file.exists()


def test_each_key_has_a_file_of_its_own(tmp_path: Path) -> None:
    key = compiler_key()
    files = {CompileCache(tmp_path, key | {"model": name}).file for name in ("yolo11n", "yolo11s")}
    assert len(files | {CompileCache(tmp_path, key).file}) == 3
