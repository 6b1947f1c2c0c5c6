"""Moments that convolutions write on the way, under Triton's interpreter, against those of what they have stored."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from paceline.models.blocks import Bottleneck, ConvUnit, SplitChain
from paceline.models.convolution import Convolution
from paceline.models.operations.moments import Moments, Tally
from paceline.models.stem import StemConvolution
from paceline.parallel.norms import BatchNorm, BatchStatistics, _Synchronised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import ModuleType

    from torch import Tensor

MODULES = ("moment_kernels", "part_kernels", "joint_kernels", "fused_joint", "narrow_kernels", "narrow_conv")
MODULES += ("norm_kernels", "fused_norm", "stem_kernels", "fused_stem")
EPS = 1e-3


@pytest.fixture(scope="module")
def kernels(operations: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[dict[str, ModuleType]]:
    """Return the modules that launch kernels, which Triton's interpreter runs, by name."""
    with operations(*MODULES):
        yield {name: importlib.import_module(f"paceline.models.operations.{name}") for name in MODULES}


def exact(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a map as it is stored, in double."""
    variance, mean = torch.var_mean(y.detach().double(), (0, 2, 3), correction=0)
    return mean, variance


def check(tally: Tally, y: Tensor, bound: float = 1e-5) -> Moments:
    """Compare moments with those of a map; return them."""
    moments = tally.moments
    assert moments is not None
    assert moments.table.dtype == torch.float32
    assert not moments.table.requires_grad
    mean, variance, count = moments.joined()
    right_mean, right_variance = exact(y)
    assert float(count) == y.numel() / y.shape[1], "every cell is in one part"
    scale = float(right_variance.max().sqrt() + right_mean.abs().max())
    torch.testing.assert_close(mean.double(), right_mean, rtol=1e-6, atol=1e-6 * scale)
    torch.testing.assert_close(variance.double(), right_variance, rtol=bound, atol=1e-12)
    return moments


def image_of(*shape: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    """Return numbers around a mean, channels-last."""
    torch.manual_seed(sum(shape))
    return (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=torch.channels_last)


DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("images", "channels", "out_channels", "size", "stride"),
    [
        pytest.param(2, 16, 8, (9, 7), 1, id="part of a tile"),
        pytest.param(2, 8, 16, (33, 17), 1, id="several tiles"),
        pytest.param(1, 16, 32, (21, 33), 2, id="stride two"),
        pytest.param(1, 8, 24, (16, 8), 1, id="one tile, channels that fill no power of two"),
        pytest.param(1, 8, 8, (1, 1), 1, id="one cell"),
        pytest.param(2, 40, 16, (9, 11), 1, id="cell by cell"),
    ],
)
def test_narrow_convolutions_know_the_moments_of_what_they_store(
    kernels: dict[str, ModuleType],
    images: int,
    channels: int,
    out_channels: int,
    size: tuple[int, int],
    stride: int,
    dtype: torch.dtype,
) -> None:
    x = image_of(images, channels, *size, dtype=dtype, mean=1.0)
    weight = torch.randn(out_channels, channels, 3, 3).requires_grad_()
    tally = Tally()
    y = kernels["narrow_conv"].convolved(x, weight, stride, dtype, tally=tally)
    check(tally, y)
    assert torch.equal(y, kernels["narrow_conv"].convolved(x, weight, stride, dtype)), "and store the same"
    again = Tally()
    kernels["narrow_conv"].convolved(x, weight, stride, dtype, tally=again)
    assert torch.equal(again.moments.table, tally.moments.table)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("widths", "out_channels"), [((8, 16), 40), ((16, 16, 16), 64), ((24, 8), 136)])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 16, 8), (3, 9, 11)], ids=str)
def test_joint_convolutions_know_the_moments_of_what_they_store(
    kernels: dict[str, ModuleType],
    widths: tuple[int, ...],
    out_channels: int,
    size: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    images, height, width = size
    maps = [image_of(images, channels, height, width, dtype=dtype, mean=1.0) for channels in widths]
    weight = (torch.randn(out_channels, sum(widths), 1, 1) / 8).requires_grad_()
    tally = Tally()
    y = kernels["fused_joint"].convolved(weight, maps, dtype, tally=tally)
    check(tally, y)
    assert torch.equal(y, kernels["fused_joint"].convolved(weight, maps, dtype)), "and store the same"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", [16, 40, 96])
@pytest.mark.parametrize(("stride", "shape"), [(2, (2, 16, 24)), (2, (2, 13, 19)), (1, (1, 9, 10)), (2, (1, 1, 1))])
def test_the_first_convolution_knows_the_moments_of_what_it_stores(
    kernels: dict[str, ModuleType], shape: tuple[int, int, int], stride: int, filters: int, dtype: torch.dtype
) -> None:
    images, height, width = shape
    x = image_of(images, 3, height, width, dtype=dtype, mean=2.0)
    weight = torch.randn(filters, 3, 3, 3).requires_grad_()
    stem, tally = kernels["fused_stem"], Tally()
    small = stem.Launch(groups=16, filters=32, warps=4, stages=2, programs=6)
    for launch in (stem.FORWARD, small):
        y = stem.convolved(x, weight, stride=stride, dtype=dtype, tally=tally, forward=launch)
        check(tally, y)
        plain = stem.convolved(x, weight, stride=stride, dtype=dtype, forward=launch)
        assert torch.equal(y, plain), "and stores the same"


def test_the_variance_of_large_values_is_not_lost(kernels: dict[str, ModuleType]) -> None:
    """Of numbers around 1,000 whose deviation is 1, half precision's last step: squares would keep one digit."""
    kind, tally = torch.float16, Tally()
    x = image_of(2, 8, 17, 9, dtype=kind)
    x[:, 0] += 1000
    weight = torch.zeros(8, 8, 3, 3)
    weight[:, :, 1, 1] = torch.eye(8)
    y = kernels["narrow_conv"].convolved(x, weight.requires_grad_(), 1, kind, tally=tally)
    assert float(y[:, 0].detach().mean()) > 999
    check(tally, y, 1e-5)
    images = image_of(2, 3, 16, 24, dtype=kind)
    images[:, 0] += 1000
    weight = torch.zeros(8, 3, 3, 3)
    weight[:, 0, 1, 1] = 1
    y = kernels["fused_stem"].convolved(images, weight.requires_grad_(), stride=1, dtype=kind, tally=tally)
    check(tally, y, 1e-5)


def test_nothing_beyond_the_map_is_counted(kernels: dict[str, ModuleType]) -> None:
    """Cells of a tile beyond an edge see some of the map: what is computed there is neither stored nor summed up."""
    x = torch.full((1, 8, 17, 9), 100.0, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    weight, tally = torch.full((8, 8, 3, 3), 9.0).requires_grad_(), Tally()
    x[:, :, :-1, :-1] = 0
    y = kernels["narrow_conv"].convolved(x, weight, 1, torch.float16, tally=tally)
    check(tally, y)


class Case:
    """A map, what it is normalised with, and its moments in uneven parts."""

    def __init__(self, parts: int) -> None:
        torch.manual_seed(parts)
        self.y = (torch.randn(2, 40, 15, 14) + 3).bfloat16().contiguous(memory_format=torch.channels_last)
        self.weight, self.bias = torch.rand(40) + 0.5, torch.randn(40)
        rows = self.y.permute(0, 2, 3, 1).flatten(0, 2).float()
        cuts = torch.arange(1, parts) * (len(rows) - 20) // parts + torch.arange(1, parts) % 3
        pieces = torch.tensor_split(rows, cuts)
        means = torch.stack([piece.mean(0) for piece in pieces])
        spreads = torch.stack([piece.var(0, correction=0) * len(piece) for piece in pieces])
        counts = torch.tensor([float(len(piece)) for piece in pieces])
        self.moments = Moments(torch.cat([means.flatten(), spreads.flatten(), counts]), 40)

    def normed(self, kernels: dict[str, ModuleType], moments: Moments | None) -> tuple[Tensor, ...]:
        """Return results, statistics and gradients."""
        latest = (torch.empty(40), torch.empty(40))
        leaves = [value.clone().requires_grad_() for value in (self.y, self.weight, self.bias)]
        (z,) = kernels["fused_norm"].normed_and_activated(*leaves, latest, eps=EPS, silu=True, moments=moments)
        torch.manual_seed(0)
        z.backward(torch.randn(z.shape).bfloat16())
        return z.detach(), *latest, *(value.grad for value in leaves if value.grad is not None)


@pytest.mark.parametrize("parts", [1, 2, 33, 130])
@pytest.mark.parametrize("most", [1, 4, 1024])
def test_a_norm_is_the_same_by_moments(
    kernels: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, parts: int, most: int
) -> None:
    """However many parts there are, and however often they are joined to fewer before."""
    monkeypatch.setattr(kernels["fused_norm"], "_MOST_PARTS_BEFORE", most)
    monkeypatch.setattr(kernels["fused_norm"], "_JOINED_PARTS", 4)
    case = Case(parts)
    assert case.moments.num_parts == parts
    mean, variance, count = case.moments.joined()
    right_mean, right_variance = exact(case.y)
    assert float(count) == 420
    torch.testing.assert_close(mean.double(), right_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), right_variance, rtol=1e-5, atol=0)
    found = case.normed(kernels, case.moments)
    for value, right in zip(found, case.normed(kernels, None), strict=True):
        bound = 1e-5 if value.dtype == torch.float32 else torch.finfo(value.dtype).eps
        torch.testing.assert_close(value, right, rtol=bound, atol=bound)


class Small(nn.Module):
    """A first unit, narrow ones and joins."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ConvUnit(3, 16, 3, 2)
        self.chain = SplitChain(16, 16, 8, [Bottleneck(8, 8, residual=True)])
        self.last = ConvUnit(16, 24, 3, 2, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        """B3HW to B 24 H/4 W/4."""
        y: Tensor = self.last(self.chain(self.first(x)))
        return y


def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be used wherever a GPU would use them."""
    for room in ("models.convolution", "models.stem", "parallel.norms"):
        monkeypatch.setattr(f"paceline.{room}.on_gpu", lambda values: True)
        monkeypatch.setattr(f"paceline.{room}.usable", lambda device: True)
    monkeypatch.setattr("paceline.models.joint.usable", lambda device: True)


def trained(kernels: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, *, by_moments: bool) -> dict[str, Any]:
    """Outputs, gradients and running statistics of an update, and the names of the kernels that were started."""
    started: list[str] = []
    for name in ("fused_joint", "narrow_conv", "fused_stem", "fused_norm"):
        start = kernels[name].start_kernel

        def noted(kernel: Any, *arguments: Any, start: Any = start, **options: Any) -> None:
            started.append(kernel.fn.__name__)
            start(kernel, *arguments, **options)

        monkeypatch.setattr(kernels[name], "start_kernel", noted)
    torch.manual_seed(0)
    network = Small().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    statistics = BatchStatistics(network)
    if not by_moments:
        monkeypatch.setattr(BatchNorm, "takes_moments", lambda norm: False)
    images = torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with statistics.part(), torch.autocast("cpu", torch.bfloat16):
        output = network(images)
    (output.float() * torch.randn(output.shape)).sum().backward()
    statistics.commit()
    found: dict[str, Any] = {"started": started, "output": output.detach()}
    found |= {f"gradient of {name}": value.grad for name, value in network.named_parameters()}
    return found | network.state_dict()


def test_a_network_is_the_same_by_moments(kernels: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    on_kernels(monkeypatch)
    with monkeypatch.context() as patch:
        found = trained(kernels, patch, by_moments=True)
    with monkeypatch.context() as patch:
        expected = trained(kernels, patch, by_moments=False)
    counts = [{name: names["started"].count(name) for name in set(names["started"])} for names in (found, expected)]
    assert counts[1]["_statistics"] == counts[1]["_settle_statistics"] == 6
    assert counts[1]["_apply_gradient"] == 6
    known = {"_statistics": 1, "_apply_gradient": 5}
    assert counts[0] == counts[1] | known, "a convolution is torch's; a gradient is made where it is read"
    for name, value in expected.items():
        if name == "started":
            continue
        scale = float(value.float().abs().max())
        torch.testing.assert_close(found[name], value, rtol=2e-2, atol=1e-2 * scale, msg=name)
    for name in (name for name in expected if "running" in name):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["evaluation", "no gradient", "another norm"])
def test_moments_are_summed_up_only_where_they_are_used(
    kernels: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    on_kernels(monkeypatch)
    unit = ConvUnit(16, 8, 3).bfloat16().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if kind != "another norm":
        BatchStatistics(unit)
        unit.bn.train(kind != "evaluation")
    wanted: list[Any] = []
    forward = Convolution.forward

    def noted(convolution: Any, x: Tensor, *, tally: Tally | None = None) -> Tensor:
        y = forward(convolution, x, tally=tally)
        wanted.append(None if tally is None else tally.moments)
        return y

    monkeypatch.setattr(Convolution, "forward", noted)
    monkeypatch.setattr(BatchNorm, "_has_kernels", lambda norm, x: False)
    with torch.set_grad_enabled(kind != "no gradient"):
        unit(torch.randn(2, 16, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last))
    assert wanted == [None]


def test_a_hook_of_a_convolution_sees_its_map_and_its_result_alone() -> None:
    unit = ConvUnit(3, 8, 3, 2).train()
    assert isinstance(unit.conv, StemConvolution)
    BatchStatistics(unit)
    seen: list[Any] = []
    unit.conv.register_forward_hook(lambda module, given, result: seen.append((len(given), result.shape)))
    unit(torch.rand(2, 3, 8, 8))
    assert seen == [(1, (2, 8, 4, 4))]


def test_what_a_hook_makes_of_a_map_is_normalised_by_its_own_statistics(
    kernels: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_kernels(monkeypatch)
    unit = ConvUnit(16, 8, 3).bfloat16().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    unit.bn.float()
    BatchStatistics(unit)
    x = torch.randn(2, 16, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    alone = unit(x)
    mean = unit.bn.latest[0].clone()  # type: ignore[union-attr, index, operator]
    unit.conv.register_forward_hook(lambda module, given, result: 2 * result)
    doubled = unit(x)
    torch.testing.assert_close(unit.bn.latest[0], 2 * mean)  # type: ignore[union-attr, index, operator]
    torch.testing.assert_close(doubled, alone, rtol=3e-2, atol=3e-2)


def test_a_hook_of_the_first_convolution_sees_the_gradient_of_its_result(
    kernels: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is not left unwritten then."""
    on_kernels(monkeypatch)
    unit = ConvUnit(3, 8, 3, 2).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    BatchStatistics(unit)
    x = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    unit.conv.register_full_backward_hook(lambda module, of_x, of_y: seen.append(of_y[0]))
    found = []
    for hooks in (unit.conv._backward_hooks.copy(), {}):
        unit.conv._backward_hooks = hooks  # type: ignore[assignment]
        with torch.autocast("cpu", torch.bfloat16):
            z = unit(x)
        found.append(torch.autograd.grad(z.float().square().sum(), unit.conv.weight)[0])
    (of_y,) = seen
    right = torch.nn.grad.conv2d_weight(x, unit.conv.weight.shape, of_y.float(), stride=2, padding=1)
    torch.testing.assert_close(found[0], right, rtol=3e-2, atol=3e-2 * float(right.abs().max()))
    torch.testing.assert_close(found[1], found[0], rtol=3e-2, atol=3e-2 * float(right.abs().max()))


def test_a_compiled_unit_asks_for_no_moments() -> None:
    unit = ConvUnit(16, 8, 3).train()
    BatchStatistics(unit)
    x = torch.randn(2, 16, 6, 6)
    right = unit(x)
    torch.testing.assert_close(torch.compile(unit, backend="eager", fullgraph=True)(x), right)


def test_norms_of_several_ranks_take_moments_too(tmp_path: Path) -> None:
    """As of one rank, which is what a group of one is: the same result, statistics and gradients."""
    case = Case(33)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        found = []
        for moments in (case.moments, None):
            leaves = [value.clone().requires_grad_() for value in (case.y.float(), case.weight, case.bias)]
            assert dist.group.WORLD is not None
            z, mean, variance = _Synchronised.apply(*leaves, EPS, dist.group.WORLD, moments)  # type: ignore[no-untyped-call]
            z.square().sum().backward()
            found.append([z.detach(), mean, variance, *(value.grad for value in leaves)])
    finally:
        dist.destroy_process_group()
    for value, right in zip(*found, strict=True):
        assert value is not None
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-4)
