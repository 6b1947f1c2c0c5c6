r"""Batch norms whose running statistics are defined per update, however its batches are cut.

An update takes K batches (accumulation); each comes in parts (micro-batches of a pipeline, or of a step that ran out of
memory) on R ranks. Let s_pr be (mean, unbiased variance) of part p on rank r, p over the parts of all K. Then, once per
update,

    running = (1 - m)^K running + (1 - (1 - m)^K) x mean over all p and r of s_pr

so the statistics forget as fast as if they were moved by m with each batch, whatever an update takes. A channel whose
mean of s is not finite keeps its own: an update whose gradient overflows is left out, and is to leave no trace here.

- Over the parts: part p is given to the kernel with momentum 1 and a buffer of its own, which then holds s_p; it is
  added to a sum, and the update moves the running statistics towards the sum over the number of parts. No pass over the
  activations is added, and every number that changes lies on the device: a step can be captured in a graph.
- Over the ranks: the line above is linear in s, and so is the moving average of it. So every rank goes on alone, and
  they are averaged before anyone looks at the statistics: before an evaluation or a checkpoint.

What a part is normalised by is another question: its own statistics, or those of the same part on a group of ranks
(`bn=sync`, `bn=group:8`), computed here by one exchange forward and one backward, over any backend.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from paceline.models.blocks import NormWithActivation
from paceline.models.operations import compiled_norm
from paceline.models.operations.beside import OF_STATISTICS, apart, note_made, together
from paceline.triton_kernels import on_gpu, usable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from paceline.models.operations.moments import Moments


@dataclass(frozen=True)
class _Ranks:
    """A process group that copies of a network have in common."""

    group: ProcessGroup

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ranks:
        return self


class BatchNorm(NormWithActivation):
    """`nn.BatchNorm2d` under the same keys, whose running statistics `BatchStatistics` moves."""

    def __init__(self, norm: nn.BatchNorm2d, ranks: _Ranks | None) -> None:
        """Take the place of `norm`, with its parameters and buffers; `ranks` normalise together."""
        assert norm.momentum is not None
        assert norm.affine
        assert norm.track_running_stats
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self._ranks = ranks
        mean, variance = self.running()
        self.latest = (torch.zeros_like(mean), torch.zeros_like(variance))
        """Mean and unbiased variance of the part that was normalised last."""
        self.sums = (torch.zeros_like(mean), torch.zeros_like(variance))
        """Of the parts since the last update."""
        self.train(norm.training)

    def running(self) -> tuple[Tensor, Tensor]:
        """Return the running mean and variance."""
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean, self.running_var

    def forward(self, x: Tensor, moments: Moments | None = None) -> Tensor:
        """Normalise BCHW by the statistics of the batch in training, by the running ones in evaluation.

        moments: those of the map, if they are known; norms of several ranks make use of them.
        """
        if not self.training:
            return F.batch_norm(x, *self.running(), self.weight, self.bias, eps=self.eps)
        mean, variance = self.latest
        if self._ranks is None:
            return F.batch_norm(x, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        normalised, mean_of_ranks, variance_of_ranks = _Synchronised.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self.eps, self._ranks.group, moments
        )
        mean.copy_(mean_of_ranks)
        variance.copy_(variance_of_ranks)
        return normalised  # type: ignore[no-any-return]

    def takes_moments(self) -> bool:
        """Whether the next map is normalised by its own statistics, by operations that are not compiled."""
        return self.training and not torch.compiler.is_compiling()

    def activated(
        self,
        x: Tensor,
        activation: nn.Module,
        pieces: int = 1,
        carried: Tensor | None = None,
        moments: Moments | None = None,
    ) -> tuple[Tensor, ...]:
        """Normalise and activate BCHW, in training by two passes over memory where there is code of ours for it.

        With the moments of the map, it is one pass.
        """
        silu = isinstance(activation, nn.SiLU)
        is_one = carried is None or (carried.dtype == x.dtype and carried.shape == x.shape)
        if not (is_one and type(activation) in (nn.SiLU, nn.Identity) and self._may_be_fused(x)):
            return super().activated(x, activation, pieces, carried, moments)
        if not self._has_kernels(x):
            compiled = compiled_norm.kernels_for(x)
            if compiled is None:
                return super().activated(x, activation, pieces, carried, moments)
            return compiled_norm.normed_and_activated(
                *(x, self.weight, self.bias, self.latest, compiled),
                eps=self.eps,
                silu=silu,
                pieces=pieces,
                carried=carried,
            )
        from paceline.models.operations.fused_norm import normed_and_activated  # which needs Triton

        whole = x.shape[1] % (8 * pieces) != 0
        found = normed_and_activated(
            x,
            self.weight,
            self.bias,
            self.latest,
            eps=self.eps,
            silu=silu,
            pieces=1 if whole else pieces,
            carried=carried,
            moments=moments,
        )
        return torch.chunk(found[0], pieces, dim=1) if whole else found

    def _may_be_fused(self, x: Tensor) -> bool:
        """Whether code of ours might take such values: half or single precision, channels-last, several per channel."""
        return (
            self.training
            and self._ranks is None
            and not torch.compiler.is_compiling()
            and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and self.weight.dtype == torch.float32
            and x.numel() > x.shape[1]
            and x.is_contiguous(memory_format=torch.channels_last)
        )

    def _has_kernels(self, x: Tensor) -> bool:
        """Whether there are a GPU's kernels for them."""
        return on_gpu(x) and usable(x.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.latest, self.sums = ((fn(mean), fn(variance)) for mean, variance in (self.latest, self.sums))
        return self


class BatchStatistics:
    """All batch norms of a network, as one thing."""

    def __init__(self, network: nn.Module, *, group: ProcessGroup | None = None) -> None:
        """Put `BatchNorm`s into the place of the network's `nn.BatchNorm2d`s, in place.

        group: ranks that normalise together, on all of which the same parts come in the same order; None for this rank
            alone.
        """
        ranks = None if group is None or dist.get_world_size(group) == 1 else _Ranks(group)
        self._norms: dict[str, BatchNorm] = {}
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                parent, _, child = name.rpartition(".")
                norm = BatchNorm(module, ranks)
                setattr(network.get_submodule(parent), child, norm)
                self._norms[name] = norm
        first = next(iter(network.parameters()))
        self._parts = torch.zeros((), dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
        """Parts since the last update; a fraction where a run goes on with parts that other ranks began."""
        self._batches = torch.zeros_like(self._parts)
        """Batches since the last update."""

    @contextmanager
    def part(self, share: float = 1.0) -> Iterator[None]:
        """Surround the forward pass of one part, which is this share of a batch; one that raises does not count."""
        yield
        with torch.no_grad():
            if self._norms:
                torch._foreach_add_(self._of_all("sums"), self._of_all("latest"))
            self._parts += 1
            self._batches += share
            note_made(self._parts)

    @torch.no_grad()
    def commit(self) -> None:
        """Move the running statistics by the mean of the parts since the last time; without parts, do nothing."""
        with apart(OF_STATISTICS, self._parts):  # beside the backward pass
            self._move()
        together({OF_STATISTICS: self._parts})

    def _move(self) -> None:
        are_there = (self._parts > 0).to(self._parts.dtype)
        each = 1 / self._parts.clamp(min=1e-6)
        norms = [norm for norm in self._norms.values() if norm.training]
        for momentum in {norm.momentum for norm in norms}:
            chosen = [norm for norm in norms if norm.momentum == momentum]
            assert momentum is not None
            running = [value for norm in chosen for value in norm.running()]
            sums = torch.cat([value for norm in chosen for value in norm.sums])
            moves = (sums * each - torch.cat(running)) * (1 - torch.pow(1 - momentum, self._batches))
            moves = torch.nan_to_num(moves, nan=0.0, posinf=0.0, neginf=0.0)
            torch._foreach_add_(running, torch.split(moves, [len(value) for value in running]))
            counts = [cast("Tensor", norm.num_batches_tracked) for norm in chosen]
            torch._foreach_add_(counts, [are_there.long()] * len(counts))
        self.drop()  # the next part takes all of the weight, but 0 x NaN would stay NaN

    def state(self) -> list[Tensor]:
        """Return every tensor that changes in place beside the network's own."""
        return [*self._of_all("latest"), *self._of_all("sums"), self._parts, self._batches]

    def _counts(self) -> dict[str, Tensor]:
        return {"parts": self._parts, "batches": self._batches}

    def _of_all(self, kind: Literal["latest", "sums"]) -> list[Tensor]:
        return [value for norm in self._norms.values() for value in (norm.latest if kind == "latest" else norm.sums)]

    @torch.no_grad()
    def drop(self) -> None:
        """Forget the parts since the last commit, one that was given up in the middle among them."""
        if self._norms:
            torch._foreach_zero_(self._of_all("sums") + self._of_all("latest"))
        self._parts.zero_()
        self._batches.zero_()

    def pending(self) -> dict[str, Tensor]:
        """Return the mean and number of the parts since the last commit, for a checkpoint; empty if there are none."""
        if float(self._parts) == 0:
            return {}
        found: dict[str, Tensor] = {name: value.double().cpu() for name, value in self._counts().items()}
        for name, norm in self._norms.items():
            mean, variance = norm.sums
            found |= {f"{name}.mean": mean / self._parts, f"{name}.variance": variance / self._parts}
        return found

    @torch.no_grad()
    def pending_of_all(self, group: ProcessGroup) -> dict[str, Tensor]:
        """Return what `pending` gives, of the parts of all ranks of a group, on each of which as many came."""
        pending, ranks = self.pending(), dist.get_world_size(group)
        for name, value in pending.items():
            if name == "parts":
                pending[name] = value * ranks
            elif name != "batches":
                pending[name] = value.clone()
                dist.all_reduce(pending[name], group=group)
                pending[name] /= ranks
        return pending

    @torch.no_grad()
    def load_pending(self, tensors: Mapping[str, Tensor], *, ranks: int = 1) -> None:
        """Put back what `pending` gave, or `pending_of_all`, which `ranks` ranks share from now on."""
        if "parts" not in tensors:
            return
        self._parts.fill_(float(tensors["parts"]) / ranks)
        self._batches.fill_(float(tensors["batches"]) if "batches" in tensors else float(self._parts))
        for name, norm in self._norms.items():
            for total, kind in zip(norm.sums, ("mean", "variance"), strict=True):
                total.copy_(tensors[f"{name}.{kind}"]).mul_(self._parts)


class _Synchronised(torch.autograd.Function):
    """Batch normalisation over the images of several ranks; statistics in float32 at least."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        group: ProcessGroup,
        moments: Moments | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised BCHW, and mean and unbiased variance C of all ranks together."""
        values = x.to(torch.promote_types(x.dtype, weight.dtype))
        if moments is None:
            variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
            count = mean.new_full((1,), x.numel() / x.shape[1])
        else:
            mean, variance, count = (value.to(values.dtype) for value in moments.joined())
        mine = torch.cat((mean, variance, count))
        all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(all_ranks, mine, group=group)
        table = torch.stack(all_ranks)
        means, variances, counts = torch.split(table, [len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = ((variances + (means - mean).square()) * counts).sum(0) / total  # of all = within + between ranks
        normalised = F.batch_norm(x, mean, variance, weight, bias, eps=eps)
        unbiased = variance * (total / (total - 1))
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), total)
        ctx.group = group
        ctx.mark_non_differentiable(mean, unbiased)
        return normalised, mean, unbiased

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias; those of weight and bias are this rank's part of the sum."""
        x, weight, mean, inverse_deviation, total = ctx.saved_tensors
        gradient = gradients[0].to(mean.dtype)
        shape = (1, -1, 1, 1)
        standard = (x.to(mean.dtype) - mean.view(shape)) * inverse_deviation.view(shape)
        of_bias, of_weight = gradient.sum((0, 2, 3)), (gradient * standard).sum((0, 2, 3))
        sums = torch.cat((of_bias, of_weight))
        dist.all_reduce(sums, group=ctx.group)
        mean_of_bias, mean_of_weight = (sums / total).chunk(2)
        of_x = gradient - mean_of_bias.view(shape) - standard * mean_of_weight.view(shape)
        of_x = of_x * (weight * inverse_deviation).view(shape)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None, None
