"""Lists by kernels, under Triton's interpreter, beside the same by torch; and that Triton compiles these kernels."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compiling import run_apart
from hypothesis import given, settings
from hypothesis import strategies as st
from listed import MANY, OPTIMIZERS, PLACES, SHAPES, Listed, Place, Watched, updated
from steps import everything, make_step, run, works

from paceline import lists, triton_kernels
from paceline.lists import Walks, convert
from paceline.training.ema import Ema
from paceline.triton_kernels import kernels_left_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import ModuleType

    from torch import Tensor

FEW = settings(max_examples=15, deadline=None)
NUMBERS = st.integers(0, 2**31)


@pytest.fixture(scope="module", autouse=True)
def counts(interpreting: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[Counter[str]]:
    """Let Triton's interpreter run these kernels wherever a GPU would, and count their launches."""
    counts: Counter[str] = Counter()

    def noted(kernel: Any, *given: Any, start: Any = lists.start_kernel, **options: Any) -> None:
        counts[kernel.fn.__name__] += 1
        start(kernel, *given, **options)

    with interpreting("paceline.list_kernels"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lists, "usable", lambda device: not triton_kernels.are_left_out())
        patch.setattr(lists, "start_kernel", noted)
        yield counts


@pytest.fixture(autouse=True)
def _anew(counts: Counter[str]) -> None:
    counts.clear()


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert one.stride() == other.stride()


def finished(places: list[Place], seed: int, *, clip: float, value: float | None = None, **given: Any) -> list[Tensor]:
    """What comes of the gradients of two updates, the second with a loss scale that has adapted."""
    listed, found = Listed(places, seed=seed, scale=64.0), []
    total = listed.gradient_sum(clip=clip)
    for images in (12, 5):
        listed.give_gradients(value=value)
        not_finite = listed.counted(total, images=images).finish(**given)
        found += [not_finite.clone(), *(gradient.clone() for gradient in listed.gradients())]
        found += [state.clone() for state in total.state()]
    return found


@FEW
@given(PLACES, NUMBERS, st.sampled_from([0.0, 0.5, 1e4]), st.sampled_from([1.0, 0.25]))
def test_gradients_are_divided_and_clipped_as_by_torch(
    places: list[Place], seed: int, clip: float, share: float
) -> None:
    found = finished(places, seed, clip=clip, share=share)
    again = finished(places, seed, clip=clip, share=share)
    with kernels_left_out():
        expected = finished(places, seed, clip=clip, share=share)
    assert_near(found, expected)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True)), "the same bits each time"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_what_is_not_finite_is_told_and_stays(value: float, clip: float) -> None:
    """The square of 1e30 is not finite either."""
    places = [Place((1030,)), Place((4, 3, 3, 3), 1, channels_last=True), Place((3,))]
    found = finished(places, 0, clip=clip, value=value)
    with kernels_left_out():
        expected = finished(places, 0, clip=clip, value=value)
    assert float(found[0]) == 1.0
    assert_near(found, expected)


@pytest.mark.parametrize("images", [0, 7])
def test_a_normaliser_below_one_counts_as_one(images: int) -> None:
    found = []
    for way in (True, False):
        listed = Listed([Place((5,)), Place((30,))])
        listed.give_gradients()
        total = listed.counted(listed.gradient_sum(), images=images, normaliser=0.125)
        if way:
            total.finish()
        else:
            with kernels_left_out():
                total.finish()
        found.append(listed.gradients())
    assert_near(*found)


def test_the_norm_is_that_of_all_ranks(counts: Counter[str]) -> None:
    """Four ranks that hold as much each: half of the clipped gradient is left of each."""
    places = [Place((2000,)), Place((7,), 1)]
    asked: list[Tensor] = []

    def add_up(squared: Tensor) -> Tensor:
        assert squared.dim() == 0
        asked.append(squared.clone())
        return squared.mul_(4)

    alone, among = (finished(places, 1, clip=1e-3, add_up=add) for add in (None, add_up))
    assert counts["_settle"] == 4
    torch.testing.assert_close([value / 2 for value in alone[1:3]], among[1:3], rtol=1e-4, atol=0.0)
    listed = Listed(places, seed=1)
    listed.give_gradients()
    exact = sum(float(gradient.double().square().sum()) for gradient in listed.gradients())
    assert float(asked[0]) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@FEW
@given(places=PLACES, seed=NUMBERS)
def test_updates_are_those_of_torch(name: str, places: list[Place], seed: int) -> None:
    found = updated(Listed(places, seed=seed), name)
    with kernels_left_out():
        expected = updated(Listed(places, seed=seed), name)
    for ours, theirs, before in zip(found, expected, [None, *found[:-1]], strict=True):
        assert_near(ours, theirs)
        if before is found[1]:
            assert all(torch.equal(one, other) for one, other in zip(ours, before, strict=True)), "left out"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_that_is_left_out_changes_nothing(name: str, value: float) -> None:
    listed = Listed([Place((1030,)), Place((4, 3, 3, 3), 1, channels_last=True), Place((3,)), Place((1,))])
    optimizer = listed.optimizer(name)
    listed.give_gradients()
    optimizer.step()
    before = listed.state(optimizer)
    listed.give_gradients(value=value)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(listed.state(optimizer), before, strict=True))


@FEW
@given(PLACES, NUMBERS)
def test_the_average_is_that_of_torch(places: list[Place], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    watched = Watched(Listed(places, seed=seed).parameters, [place.filled(draw) for place in places])
    ours, theirs = (Ema(watched, average=copy.deepcopy(watched), decay=0.9, ramp_updates=3) for _ in range(2))
    for _ in range(3):
        watched.change(draw)
        ours.update()
        with kernels_left_out():
            theirs.update()
        found, expected = (list(ema.network.state_dict().values()) for ema in (ours, theirs))
        assert_near(found, expected)
        assert [int(value) for value in found if not value.is_floating_point()] == [watched.batches, watched.others]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@FEW
@given(places=PLACES, seed=NUMBERS)
def test_halves_are_those_of_torch_to_the_bit_and_back(dtype: torch.dtype, places: list[Place], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    of = [place.filled(draw).mul_(10.0 ** (3 * nth - 6)) for nth, place in enumerate(places)]  # tiny ones, and infinite
    halves = [torch.empty_like(value, dtype=dtype) for value in of]
    back = [torch.full_like(value, -1.0) for value in of]
    convert(halves, of, kernels=True)
    convert(back, halves, kernels=True)
    for value, half, again in zip(of, halves, back, strict=True):
        assert half.stride() == value.stride()
        assert torch.equal(half, value.to(dtype))
        assert torch.equal(again, half.float())


def test_one_launch_each_however_many_tensors(counts: Counter[str]) -> None:
    listed = Listed(MANY)
    told = -(-len(MANY) // lists._NOTED)
    assert told > 1
    listed.give_gradients()
    listed.counted(listed.gradient_sum(clip=1.0)).finish()
    assert counts == Counter({"_note": told, "_squares": 1, "_settle": 1, "_multiply": 1})
    expected = [gradient.clone() for gradient in listed.gradients()]
    with kernels_left_out():
        other = Listed(MANY)
        other.give_gradients()
        other.counted(other.gradient_sum(clip=1.0)).finish()
    assert_near(expected, other.gradients())
    counts.clear()
    draw = torch.Generator().manual_seed(0)
    of = [place.filled(draw) for place in MANY[:70]]
    halves = [torch.empty_like(value, dtype=torch.bfloat16) for value in of]
    convert(halves, of, kernels=True)
    assert counts == Counter({"_convert": 3})
    assert all(torch.equal(half, value.bfloat16()) for half, value in zip(halves, of, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tables_are_made_once_and_follow_what_moves_after_all(name: str) -> None:
    places = [Place(shape) for shape in SHAPES]
    ours, theirs = Listed(places), Listed(places)
    mine, other = ours.optimizer(name), theirs.optimizer(name)
    made = []
    for moves in (False, False, False, True, False):
        for listed, optimizer, left_out in ((ours, mine, False), (theirs, other, True)):
            listed.give_gradients()
            if moves:
                for parameter in listed.parameters:
                    parameter.data = parameter.data.clone()
            if left_out:
                with kernels_left_out():
                    optimizer.step()
            else:
                optimizer.step()
        made.append(len(mine._walks._tables))
        assert_near(ours.state(mine), theirs.state(other))
    assert made[0] == made[1] == made[2] < made[3] == made[4]


def test_what_kernels_do_not_take_is_left_to_torch(counts: Counter[str]) -> None:
    one, other = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    walks = Walks()
    assert walks.over([one], moving=[other]) is not None
    assert walks.over([one], moving=[other.contiguous(memory_format=torch.channels_last)]) is None, "another order"
    assert walks.over([one.double()], moving=[other.double()]) is None
    assert walks.over([one], moving=[other.double()]) is None
    assert walks.over(moving=[other[:, :2]]) is None, "gaps"
    assert walks.over(moving=[other[:1].expand(4, -1, -1, -1)]) is None, "several in one place"
    assert walks.over([one], [other.bfloat16()]) is None
    assert walks.over([torch.empty(0)]) is None, "nothing"
    assert walks.over([]) is None
    narrow = torch.randn(8, 4, 1, 1)
    pixels = narrow.as_strided(narrow.shape, (4, 1, 4, 4))  # as channels-last has it
    assert walks.over([narrow], moving=[pixels]) is not None, "one order in other words"
    counts.clear()
    half = torch.empty_like(one[:, :2], dtype=torch.bfloat16)
    convert([half], [one[:, :2]], kernels=True)
    convert([torch.empty_like(one, dtype=torch.bfloat16)], [one.double()], kernels=True)
    assert not counts
    assert torch.equal(half, one[:, :2].bfloat16())


def test_updates_of_gradients_in_another_order(counts: Counter[str]) -> None:
    found = []
    for left_out in (False, True):
        listed = Listed([Place((4, 3, 3, 3), 0, channels_last=True), Place((5,))])
        optimizer = listed.optimizer("SGD")
        listed.give_gradients()
        listed.parameters[0].grad = listed.parameters[0].grad.contiguous()  # type: ignore[union-attr]
        if left_out:
            with kernels_left_out():
                optimizer.step()
        else:
            optimizer.step()
            assert counts["_descend"] == 1, "of the group whose gradients lie as they should"
        found.append(listed.state(optimizer))
    assert_near(*found)


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_steps_of_a_warm_up_are_those_of_torch(
    optimizer: str, amp_dtype: torch.dtype | None, counts: Counter[str]
) -> None:
    asked = works(6, optimizer)
    updates = sum(work.completes for work in asked)
    ours, theirs = (make_step(optimizer, dtype=torch.float32, amp_dtype=amp_dtype) for _ in range(2))
    said = run(ours, asked)
    assert counts["_settle"] == counts["_approach"] == counts["_copy"] == updates > 1
    with kernels_left_out():
        expected = run(theirs, asked)
    torch.testing.assert_close(said, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(everything(ours)["state"], everything(theirs)["state"], rtol=1e-3, atol=1e-4)


PROGRAM = """
import triton.language as tl
from compiling import compiled
from paceline import list_kernels as kernels, lists

LONG = dict.fromkeys(("chunks", "tensors", "moving", "steps"), "*i64")
FLOATS = ("weight_decay", "eps", "beta1", "rest1", "log2_beta1", "beta2", "rest2", "log2_beta2")
KINDS = LONG | dict.fromkeys(FLOATS, "fp32") | {"num_tensors": "i32"}

for capability in (80, 90):
    given = {"capability": capability, "other": "*fp32"}
    compiled(kernels._note, {"room": lists._NOTED}, LONG | {"words": ("i64",) * lists._NOTED, "first": "i32"}, **given)
    of_settle = {"num_parts": "i32", "share": "fp32", "clip": "fp32"}
    compiled(kernels._settle, {"room": lists._SETTLED}, of_settle, warps=8, **given)
    for name in ("_squares", "_multiply", "_count", "_adapt", "_approach"):
        compiled(getattr(kernels, name), {"chunk": lists.CHUNK}, KINDS, **given)
    for nesterov in (True, False):
        compiled(kernels._descend, {"chunk": lists.CHUNK, "nesterov": nesterov}, KINDS, **given)
    compiled(kernels._copy, {"chunk": lists.CHUNK, "kind": tl.int64}, KINDS, **given)
    for room in lists._ROOMS:
        words = dict.fromkeys(("to", "of", "sizes", "firsts"), ("i64",) * room)
        for to, of in ((tl.bfloat16, tl.float32), (tl.float32, tl.float16)):
            fixed = {"room": room, "chunk": lists.CHUNK, "to_kind": to, "of_kind": of}
            compiled(kernels._convert, fixed, words, **given)
print("all")
"""


def test_triton_compiles_them(tmp_path: Path) -> None:
    assert run_apart(PROGRAM, tmp_path).endswith("all")


def test_a_word_is_odd_and_long_for_every_number() -> None:
    """So that Triton, which compiles anew for 1, for multiples of 16 and for other lengths, compiles once."""
    for number in (0, 1, 8, 16, 2**31 - 1, 2**31, 2**47 + 16, lists._NOWHERE):
        (word,) = lists._words([number], 1)
        assert word % 2 == 1
        assert 2**62 <= word < 2**63
