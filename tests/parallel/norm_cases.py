"""What the ranks of a world do in the tests of batch norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paceline.parallel.norms import BatchStatistics

CHANNELS = 5


def maps(images: int, *, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Feature maps far from zero mean, and a gradient for them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, CHANNELS, 4, 6)
    values = torch.randn(shape, generator=generator, dtype=dtype) * 3 + 100
    return values, torch.randn(shape, generator=generator, dtype=dtype)


def norm(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A batch norm that scales and shifts."""
    made = nn.Sequential(nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.03)).to(dtype)
    with torch.no_grad():
        made[0].weight.copy_(torch.linspace(-1, 2, CHANNELS))
        made[0].bias.copy_(torch.linspace(1, -1, CHANNELS))
    return made


def synchronised(images: tuple[int, ...], *, channels_last: bool = False) -> list[dict[str, Tensor]]:
    """Normalise two parts, rank r with images[r] images; returns what each rank got."""
    rank = dist.get_rank()
    first = sum(images[:rank])
    network = norm()
    statistics = BatchStatistics(network, group=dist.group.WORLD)
    found: dict[str, Tensor] = {}
    for part in range(2):
        values, gradient = (tensor[first : first + images[rank]] for tensor in maps(sum(images), seed=part))
        if channels_last:
            values = values.contiguous(memory_format=torch.channels_last)
        values = values.clone().requires_grad_(True)
        with statistics.part():
            output = network(values)
        output.backward(gradient)
        assert values.grad is not None
        found |= {f"output{part}": output.detach(), f"gradient{part}": values.grad}
    statistics.commit()
    found |= {f"grad.{name}": value.grad for name, value in network.named_parameters() if value.grad is not None}
    found |= network.state_dict()
    all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, found)
    return all_ranks
