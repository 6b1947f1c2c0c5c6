"""Launches of our own: the same ones as Triton's, for whatever arguments, and its own where something is unusual."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline import triton_kernels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

triton = pytest.importorskip("triton")
launch = pytest.importorskip("paceline.triton_launch")

STAND_IN = Path(__file__).resolve().parents[1] / "bench" / "step" / "stand_in.py"


def sampled(
    x, y, count, pitch, eps, pieces, rows, wide: triton.language.constexpr, flag: triton.language.constexpr = 3
):  # type: ignore[no-untyped-def]
    """Be compiled by nobody; `count` is looked at, `rows` is not."""


class Elsewhere(torch.Tensor):
    """On another device."""

    def get_device(self) -> int:
        return 1


@pytest.fixture
def gpu() -> Iterator[Any]:
    """A stand-in for a GPU."""
    spec = importlib.util.spec_from_file_location("stand_in", STAND_IN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    with module.standing_in() as stand_in:
        yield stand_in
    del sys.modules[spec.name]


def kernel() -> Any:
    """A kernel that was never launched."""
    return triton.jit(sampled, do_not_specialize=("rows",))


def arguments(draw: random.Random) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Draw arguments of `sampled` that differ in whatever Triton may look at."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
    numbers = (1, 2, 16, 48, 2**31 + 1, 2**32)

    def tensor() -> torch.Tensor:
        size = draw.choice((0, 40))
        found = torch.zeros(64, dtype=draw.choice(dtypes))[draw.choice((0, 1, 8, 16)) :][:size]
        return torch.nn.Parameter(found) if found.is_floating_point() and draw.random() < 0.3 else found

    pieces = (tensor(), tensor()) if draw.random() < 0.7 else (tensor(), draw.choice(numbers))
    given = (
        tensor(),
        draw.choice((tensor(), None)),
        draw.choice((*numbers, True, 1.0)),
        draw.choice(numbers),
        draw.choice((0.5, 1.0, 1)),
        pieces,
        draw.choice(numbers),
    )
    options: dict[str, Any] = {"wide": draw.choice((8, 16)), "num_warps": draw.choice((2, 4))}
    if draw.random() < 0.5:
        options["flag"] = draw.choice((3, 4))
    return given, options


def plain(values: Sequence[Any]) -> tuple[Any, ...]:
    """Write addresses for tensors, as the launcher in C does."""
    return tuple(
        value.data_ptr() if isinstance(value, torch.Tensor) else plain(value) if isinstance(value, tuple) else value
        for value in values
    )


def kind_of(compiled: Any) -> tuple[Any, ...]:
    """What a kernel was compiled for."""
    return tuple(map(str, (compiled.src.signature, compiled.src.constants, compiled.src.attrs)))


def test_launches_are_those_of_triton(gpu: Any) -> None:
    """Drawn arguments on two devices and streams, by Triton alone and by us: the same kinds, in the same order."""
    draw = random.Random(0)
    ours, theirs = kernel(), kernel()
    start = launch.launcher_of(ours)
    assert isinstance(start, launch.Launcher)
    drawn = [arguments(draw) for _ in range(400)]
    again = [draw.choice(drawn) for _ in range(1200)]
    for given, options in again:
        gpu.device, gpu.stream = draw.randrange(2), draw.randrange(3)
        grid = (draw.randrange(1, 9), 2, 3)[: draw.randrange(1, 4)]
        start(grid, given, options)
        theirs[grid](*given, **options)
        mine, other = gpu.launches
        gpu.launches.clear()
        assert (mine.grid, mine.stream, plain(mine.values)) == (other.grid, other.stream, plain(other.values))
        assert [type(value) for value in plain(mine.values)] == [type(value) for value in plain(other.values)]
        assert kind_of(mine.kernel) == kind_of(other.kernel)


def test_what_was_launched_is_launched_again_without_triton(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (torch.zeros(8), torch.zeros(8), 3, 4, 0.5, (torch.zeros(8), 2), 7)
    tested = kernel()
    triton_kernels.start_kernel(tested, (2,), *given, wide=8, num_warps=2)
    monkeypatch.setattr(type(tested), "run", lambda *_, **__: pytest.fail("Triton was asked again"))
    triton_kernels.start_kernel(tested, (5,), *given, wide=8, num_warps=2)
    first, second = gpu.launches
    assert (first.grid, second.grid) == ((2, 1, 1), (5, 1, 1))
    assert first.kernel is second.kernel
    assert isinstance(second.values[0], int), "an address, which the launcher does not look up"


def test_numbers_beyond_32_bits_are_told_apart_as_triton_does_alone(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be addresses, which are others each time; they arrive as they are."""
    tested, x = kernel(), torch.zeros(8)
    started = [2**62 + 2**33 + 1, 2**33 + 3]
    for word in started:
        triton_kernels.start_kernel(tested, (2,), x, x, 3, 4, 0.5, (word, word + 2), 7, wide=8, num_warps=2)
        monkeypatch.setattr(type(tested), "run", lambda *_, **__: pytest.fail("Triton was asked again"))
    assert [launched.values[5] for launched in gpu.launches] == [(word, word + 2) for word in started]
    monkeypatch.undo()
    for other in (2**33, 2**63 + 1, 5):
        triton_kernels.start_kernel(tested, (2,), x, x, 3, 4, 0.5, (other, 2**33 + 3), 7, wide=8, num_warps=2)
    kinds = [kind_of(launched.kernel) for launched in gpu.launches]
    assert kinds[0] == kinds[1]
    assert len(set(kinds)) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(64)[1:]},  # not aligned
        {"x": torch.zeros(8, dtype=torch.bfloat16)},
        {"x": torch.zeros(8).as_subclass(Elsewhere)},
        {"count": 16},
        {"count": 1},
        {"count": 2**31 + 1},
        {"count": 3.0},  # equal, and another type
        {"eps": 1},
        {"pieces": (torch.zeros(8, dtype=torch.float16), 2)},
        {"pieces": (torch.zeros(8), 16)},
        {"wide": 16},
        {"num_warps": 4},
        {"flag": 4},
    ],
)
def test_whatever_a_kernel_is_compiled_for_is_told_apart(gpu: Any, change: dict[str, Any]) -> None:
    usual = {"x": torch.zeros(8), "y": torch.zeros(8), "count": 3, "pitch": 4, "eps": 1.0}
    usual |= {"pieces": (torch.zeros(8), 2), "rows": 7, "wide": 8, "num_warps": 2}
    start = launch.launcher_of(kernel())
    for values in (usual, usual | change):
        names = ("x", "y", "count", "pitch", "eps", "pieces", "rows")
        options = {name: value for name, value in values.items() if name not in names}
        start((1,), [values[name] for name in names], options)
    assert len(start._known) == 2


def test_a_profiler_of_triton_sees_every_launch(gpu: Any) -> None:
    from triton import knobs

    seen: list[Any] = []
    start = launch.launcher_of(kernel())
    given = (torch.zeros(8), torch.zeros(8), 3, 4, 0.5, (torch.zeros(8), 2), 7)
    start((1,), given, {"wide": 8})
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        start((1,), given, {"wide": 8})
        start((1,), given, {"wide": 8})
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    start((1,), given, {"wide": 8})
    assert len(seen) == 2
    assert len(gpu.launches) == 4


def test_what_hangs_on_more_than_the_key_goes_through_triton(gpu: Any) -> None:
    """A hook of the kernel, and a number that is passed by name."""
    hooked = kernel()
    hooked.pre_run_hooks.append(lambda *_, **__: None)
    given = (torch.zeros(8), torch.zeros(8), 3, 4, 0.5, (torch.zeros(8), 2))
    start = launch.launcher_of(hooked)
    start((1,), (*given, 7), {"wide": 8})
    assert not start._known
    start = launch.launcher_of(kernel())
    start((1,), given, {"rows": 7, "wide": 8})
    start((1,), given, {"rows": 8, "wide": 8})
    assert not start._known
    assert [launched.values[6] for launched in gpu.launches] == [7, 7, 8]


def test_constants_of_a_module_stay_and_other_globals_are_looked_at_each_time(gpu: Any) -> None:
    for value, is_remembered in ((triton.language.constexpr(8), True), (8, False)):
        tested = kernel()
        tested.used_global_vals = {("WIDTH", 0): (value, {"WIDTH": value})}  # as its compilation finds them
        start = launch.launcher_of(tested)
        start((1,), (torch.zeros(8), torch.zeros(8), 3, 4, 0.5, (torch.zeros(8), 2), 7), {"wide": 8})
        assert bool(start._known) == is_remembered


def test_a_launcher_that_wants_other_arguments_is_left_to_triton(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = launch.launcher_of(kernel())
    given = (torch.zeros(8), torch.zeros(8), 3, 4, 0.5, (torch.zeros(8), 2), 7)
    start((1,), given, {"wide": 8})

    def refuses(*_: Any) -> None:
        raise TypeError("function takes exactly 20 arguments")

    start._known = {key: dataclasses.replace(ready, run=refuses) for key, ready in start._known.items()}
    for _ in range(3):
        start((1,), given, {"wide": 8})
    assert len(gpu.launches) == 4
    assert not start._known


def test_numbers_that_never_come_again_do_not_fill_the_memory(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST_KINDS", 8)
    start = launch.launcher_of(kernel())
    for number in range(30):
        start((1,), (torch.zeros(8), None, number, 4, 0.5, (torch.zeros(8), 2), 7), {"wide": 8})
    assert len(start._known) <= 8
    assert [launched.values[2] for launched in gpu.launches] == list(range(30))


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0+git", "4.0.0"])
def test_other_versions_of_triton_launch_by_themselves(gpu: Any, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert not isinstance(launch.launcher_of(kernel()), launch.Launcher)


def test_cuts_are_those_of_triton() -> None:
    for count in (*range(1, 70), 2**20 - 1, 2**20, 2**20 + 1):
        assert triton_kernels.next_power_of_2(count) == triton.next_power_of_2(count)
        for size in (1, 3, 16):
            assert triton_kernels.cdiv(count, size) == triton.cdiv(count, size)
