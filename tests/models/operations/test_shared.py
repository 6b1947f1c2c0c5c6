"""Maps that several take: their gradients are added up by the norm that made them, under Triton's interpreter."""

from __future__ import annotations

import itertools
import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from additions import Additions
from torch import nn

from paceline.models.blocks import PSA, Bottleneck, C3k, Concat, ConvUnit, SplitChain
from paceline.models.graph import IMAGES, Node, Segment
from paceline.models.heads import DetectionHead
from paceline.models.operations import shared as module
from paceline.models.operations.shared import shared
from paceline.parallel.norms import BatchNorm, BatchStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from types import ModuleType

    from torch import Tensor

CHANNELS_LAST = torch.channels_last


@pytest.fixture(scope="module")
def kernels(operations: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[ModuleType]:
    """Return the module that launches the norm's kernels, which Triton's interpreter runs."""
    with operations("moment_kernels", "norm_kernels", "fused_norm") as fused_norm:
        yield fused_norm


def apart() -> AbstractContextManager[Any]:
    """Let autograd add up what comes."""
    return mock.patch.object(module, "_left_of", return_value=None)


class Case:
    """A norm, and what its results are multiplied by where they are used."""

    def __init__(
        self,
        kernels: ModuleType,
        uses: Sequence[int],
        *,
        channels: int = 16,
        dtype: torch.dtype = torch.float32,
        carries: bool = False,
        silu: bool = True,
    ) -> None:
        torch.manual_seed(channels + sum(uses))
        self.kernels, self.uses, self.silu = kernels, uses, silu
        shape = (2, channels, 5, 6)
        self.y = (torch.randn(shape) + 1).to(dtype).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
        self.weight = torch.rand(channels).add(0.5).requires_grad_()
        self.bias = torch.randn(channels).requires_grad_()
        self.carried = torch.randn(shape).to(dtype).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
        self.carries = carries
        part = (2, channels // len(uses), 5, 6)
        self.slopes = [
            [torch.randn(part).to(dtype).contiguous(memory_format=CHANNELS_LAST) for _ in range(count)]
            for count in uses
        ]

    def pieces(self) -> tuple[Tensor, ...]:
        """Normalise."""
        channels = self.y.shape[1]
        latest = (torch.empty(channels), torch.empty(channels))
        launch = self.kernels.Launch(tile=256, warps=4, stages=3, programs=16)
        pieces: tuple[Tensor, ...] = self.kernels.normed_and_activated(
            *(self.y, self.weight, self.bias, latest),
            eps=1e-3,
            silu=self.silu,
            pieces=len(self.uses),
            carried=self.carried if self.carries else None,
            of_sums=launch,
            of_results=launch,
        )
        return pieces

    def used(self, maps: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Use each map."""
        return [
            (one * slope).float().sum()
            for ones, slopes in zip(maps, self.slopes, strict=True)
            for one, slope in zip(ones, slopes, strict=True)
        ]

    def leaves(self) -> list[Tensor]:
        return [self.y, self.weight, self.bias, *([self.carried] if self.carries else [])]

    def gradients(self, maps: Sequence[Sequence[Tensor]], **options: Any) -> list[Tensor]:
        """Gradients of all leaves."""
        return list(torch.autograd.grad(self.used(maps), self.leaves(), **options))

    def aliases(self) -> list[tuple[Tensor, ...]]:
        return [shared(piece, count) for piece, count in zip(self.pieces(), self.uses, strict=True)]

    def by_one(self) -> list[Tensor]:
        """Gradients where each piece gets the sum at once, added up in double and rounded."""
        sums = [sum(slope.double() for slope in slopes) for slopes in self.slopes]
        given = [torch.as_tensor(total).to(self.y.dtype) for total in sums]
        return list(torch.autograd.grad(self.pieces(), self.leaves(), given))


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor], bound: float = 0.0) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_several_gradients_are_their_sum_rounded_once(
    kernels: ModuleType, count: int, carries: bool, dtype: torch.dtype
) -> None:
    case = Case(kernels, (count,), dtype=dtype, carries=carries)
    with Additions() as additions:
        found = case.gradients(case.aliases())
    assert additions.count == 0
    bound = 2e-6 if dtype is torch.float32 and count > 2 else 0.0  # float32 is rounded after each of them
    assert_equal(found, case.by_one(), bound)


@pytest.mark.parametrize("carries", [False, True])
def test_two_gradients_are_the_sum_of_autograd_to_the_bit(kernels: ModuleType, carries: bool) -> None:
    case = Case(kernels, (2,), dtype=torch.bfloat16, carries=carries)
    found = case.gradients(case.aliases())
    with apart(), Additions() as additions:
        expected = case.gradients(case.aliases())
    assert additions.count == 1
    assert_equal(found, expected)


@pytest.mark.parametrize(("channels", "silu"), [(16, True), (16, False), (48, True), (144, True)])
@pytest.mark.parametrize("uses", [(1, 1), (1, 2), (1, 3), (3, 1), (2, 2), (4, 2)])
def test_halves_may_have_unlike_numbers(kernels: ModuleType, uses: tuple[int, int], channels: int, silu: bool) -> None:
    case = Case(kernels, uses, channels=channels, silu=silu, dtype=torch.bfloat16)
    with Additions() as additions:
        found = case.gradients(case.aliases())
    assert additions.count == 0
    assert_equal(found, case.by_one())


@pytest.mark.parametrize("uses", [(5,), (7,), (2, 6)])
def test_more_than_there_is_room_for_are_added_before(kernels: ModuleType, uses: tuple[int, ...]) -> None:
    case = Case(kernels, uses)
    with Additions() as additions:
        found = case.gradients(case.aliases())
    assert additions.count == max(uses) - module.MOST
    assert_equal(found, case.by_one(), 1e-5)


@pytest.mark.parametrize("channels", [1, 5, 20])
def test_numbers_of_channels_that_no_vector_divides(kernels: ModuleType, channels: int) -> None:
    case = Case(kernels, (3,), channels=channels, carries=True)
    assert_equal(case.gradients(case.aliases()), case.by_one(), 1e-5)


@pytest.mark.parametrize("uses", [(3,), (2, 2)])
@pytest.mark.parametrize("first", [0, 3, 8])
def test_gradients_that_are_parts_of_wider_maps_are_read_where_they_lie(
    kernels: ModuleType, uses: tuple[int, ...], first: int
) -> None:
    case = Case(kernels, uses)
    expected = case.by_one()
    for slopes in case.slopes:
        for number, slope in enumerate(slopes):
            wide = torch.full((2, slope.shape[1] + 12 + number, 5, 6), float("nan")).contiguous(
                memory_format=CHANNELS_LAST
            )
            wide[:, first : first + slope.shape[1]] = slope
            slopes[number] = wide[:, first : first + slope.shape[1]]
    aliases = case.aliases()
    given = [slope for slopes in case.slopes for slope in slopes]
    found = torch.autograd.grad(list(itertools.chain(*aliases)), case.leaves(), given)
    assert_equal(found, expected, 1e-5)


def test_it_is_right_whoever_takes_the_map_itself(kernels: ModuleType) -> None:
    """Aliases of an alias, the map beside them, and aliases made one after the other."""
    case = Case(kernels, (6,))
    (z,) = case.pieces()
    first, second = shared(z, 2)
    third, fourth = shared(second, 2)
    fifth, sixth = shared(z, 2)
    del fourth  # the map takes its place
    found = case.gradients([[first, third, z, fifth, sixth, z]])
    assert_equal(found, case.by_one(), 1e-5)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_aliases_that_nobody_uses_have_no_gradient(kernels: ModuleType, used: int) -> None:
    case = Case(kernels, (1,))
    aliases = shared(case.pieces()[0], 3)
    assert_equal(case.gradients([[aliases[used]]]), case.by_one())


def test_a_half_of_which_no_alias_is_used(kernels: ModuleType) -> None:
    case = Case(kernels, (2, 2))
    case.slopes[0] = [torch.zeros_like(slope) for slope in case.slopes[0]]
    expected, (_, second) = case.by_one(), case.aliases()
    found = torch.autograd.grad(second, case.leaves(), case.slopes[1])
    assert_equal(found, expected)


def test_a_second_pass_through_a_kept_graph_gives_the_same(kernels: ModuleType) -> None:
    case = Case(kernels, (3,), carries=True)
    aliases = case.aliases()
    first = case.gradients(aliases, retain_graph=True)
    assert_equal(case.gradients(aliases, retain_graph=True), first)
    assert_equal(case.gradients(aliases), case.by_one(), 1e-5)


def test_a_pass_that_breaks_off_leaves_nothing_to_the_next(kernels: ModuleType) -> None:
    case = Case(kernels, (3,))
    (z,) = case.pieces()
    aliases = shared(z, 3)

    def breaks(gradient: Tensor) -> Tensor:
        raise ArithmeticError

    one = Case(kernels, (1,))
    one.slopes, one.y, one.weight, one.bias = [case.slopes[0][:1]], case.y, case.weight, case.bias
    for right, taken in ((case.by_one(), 3), (one.by_one(), 1)):
        hook = z.register_hook(breaks)  # between the aliases and the norm
        with pytest.raises(ArithmeticError):
            case.gradients([aliases], retain_graph=True)
        hook.remove()
        found = torch.autograd.grad(aliases[:taken], case.leaves(), case.slopes[0][:taken], retain_graph=True)
        assert_equal(found, right, 1e-5)


def test_nothing_is_held_after_a_pass(kernels: ModuleType) -> None:
    case = Case(kernels, (3,))
    aliases = case.aliases()
    given = [slope.clone() for slope in case.slopes[0]]
    watched = [weakref.ref(gradient) for gradient in given]
    torch.autograd.backward(aliases[0], given, retain_graph=True)
    del given
    assert [gradient() for gradient in watched] == [None] * 3


def test_without_a_node_of_ours_or_a_gradient_it_is_the_map_itself(kernels: ModuleType) -> None:
    case = Case(kernels, (2,))
    (z,) = case.pieces()
    plain = case.y * 2
    for x in (torch.rand(1, 8, 2, 2), plain, case.y, z.detach(), z * 1):
        assert all(alias is x for alias in shared(x, 3))
    with torch.no_grad():
        assert all(alias is z for alias in shared(z, 2))
    assert all(alias is not z for alias in shared(z, 2))


def test_under_the_compiler_nothing_changes(kernels: ModuleType) -> None:
    case = Case(kernels, (2,))
    (z,) = case.pieces()

    @torch.compile(backend="eager", fullgraph=True)
    def used(x: Tensor) -> tuple[Tensor, bool]:
        first, second = shared(x, 2)
        return 2 * first + 3 * second, first is second

    found, is_one = used(z)
    assert is_one
    torch.testing.assert_close(found, 5 * z)


class Twice(nn.Module):
    """A head over one map, of which all outputs count."""

    def __init__(self) -> None:
        super().__init__()
        self.head = DetectionHead((16,), 3, depthwise=True, strides=(8,))

    def forward(self, *levels: Tensor) -> Tensor:
        """B16HW to B(64 + 3)A."""
        return torch.cat([value.flatten(1) for value in self.head(*levels)], dim=1)


def nodes() -> list[Node]:
    """Return a network with all that takes a map several times; values 1 and 3 go far."""
    return [
        Node(ConvUnit(8, 16), (IMAGES,)),
        Node(SplitChain(16, 16, 16, [Bottleneck(16, 8, residual=True), C3k(16)]), (0,)),
        Node(ConvUnit(16, 32), (1,)),
        Node(PSA(32), (2,)),
        Node(Concat(), (1, 3)),
        Node(SplitChain(48, 16, 8, [Bottleneck(8, 8, residual=False)]), (4,)),
        Node(ConvUnit(16, 16), (5,)),
        Node(Concat(), (5, 6, 3, 1)),
        Node(ConvUnit(80, 16), (7,)),
        Node(Twice(), (8,)),
    ]


def trained(cuts: Sequence[int] = (), *, detached: bool = False, sums: bool = True) -> tuple[dict[str, Tensor], int]:
    """Gradients of all weights and of the images, and how many maps torch has added; segments between the cuts."""
    torch.manual_seed(0)
    found = nodes()
    network = nn.ModuleList(node.module for node in found).to(memory_format=CHANNELS_LAST).train()  # type: ignore[call-overload]
    BatchStatistics(network)
    found = [Node(module, node.inputs) for module, node in zip(network, found, strict=True)]
    bounds = [0, *cuts, len(found)]
    segments = [Segment(found, first=first, stop=stop) for first, stop in itertools.pairwise(bounds)]
    images = torch.rand(2, 8, 4, 4).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    taken: list[tuple[Tensor, ...]] = []
    given: list[tuple[Tensor, ...]] = [(images,)]
    with nullcontext() if sums else apart(), Additions() as additions:
        for segment in segments:
            live = given[-1]
            taken.append(tuple(value.detach().requires_grad_() for value in live) if detached and taken else live)
            answer = segment(*taken[-1])
            given.append((answer,) if isinstance(answer, torch.Tensor) else answer)
        draw = torch.Generator().manual_seed(1)
        total = (given[-1][0] * torch.randn(given[-1][0].shape, generator=draw)).sum()
        total.backward()
        for after, before in zip(taken[:0:-1], given[-2:0:-1], strict=True):
            if detached:
                torch.autograd.backward(before, [value.grad for value in after])
    gradients = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    assert images.grad is not None
    return gradients | {"images": images.grad}, additions.count


OF_ATTENTION = 2
"""What torch adds: what is attended to and the positions; gradients of values, which tell both."""


@pytest.fixture
def ours(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchNorm, "_has_kernels", lambda norm, x: True)


def test_a_network_leaves_no_sum_of_maps_to_torch(ours: None) -> None:
    found, additions = trained()
    expected, before = trained(sums=False)
    assert additions == OF_ATTENTION
    assert before > 12
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("cuts", "detached"), [((2, 5, 7), False), ((3, 6), True), ((4, 8), True)])
def test_segments_in_a_row_have_the_gradient_of_the_whole(ours: None, cuts: tuple[int, ...], detached: bool) -> None:
    expected, _ = trained()
    found, additions = trained(cuts, detached=detached)
    assert detached or additions == OF_ATTENTION
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)
