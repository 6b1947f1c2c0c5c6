"""Lists of tensors of all sizes, layouts and places, and updates of them, for the tests of what goes through lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from paceline.losses.detection import LossSums
from paceline.parallel.gradient import GradientSum
from paceline.parallel.loss_scale import LossScale
from paceline.training.adamw import AdamW
from paceline.training.sgd import Sgd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.training.optimizer import Optimizer

SHAPES = [(0,), (1,), (5,), (1023,), (1024,), (1025,), (2600,), (4, 3, 3, 3), (8, 16, 1, 1), (5, 7, 3, 3), (0, 4, 1, 1)]


@dataclass(frozen=True)
class Place:
    """A shape, and where in memory."""

    shape: tuple[int, ...]
    offset: int = 0
    """Numbers before it."""
    channels_last: bool = False

    def filled(self, draw: torch.Generator, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        """Return random numbers at such a place."""
        values = torch.randn(self.shape, generator=draw)
        if self.channels_last and len(self.shape) == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        memory = torch.zeros(self.offset + values.numel(), dtype=dtype, device=device)
        return memory.as_strided(values.shape, values.stride(), self.offset).copy_(values)


PLACES = st.lists(st.builds(Place, st.sampled_from(SHAPES), st.integers(0, 5), st.booleans()), min_size=1, max_size=6)
"""Lists that an interpreter can go through."""
MANY = [Place(shape, nth % 6, nth % 2 == 0) for nth, shape in enumerate(SHAPES * 25)]
"""More than are told to a kernel at once."""


class Listed:
    """Parameters at places, their gradients, and what is done with them; the same ones for the same seed."""

    def __init__(self, places: Sequence[Place], *, seed: int = 0, device: str = "cpu", scale: float = 1.0) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        self._places, self._device = places, device
        self.parameters = [nn.Parameter(place.filled(self._draw, device=device)) for place in places]
        self.scale = LossScale(scale, torch.device(device), adaptive=scale != 1.0)

    def give_gradients(self, *, without: Sequence[int] = (), value: float | None = None) -> None:
        """Give all but some a gradient elsewhere that lies alike; let the last number of plain ones be this value."""
        for nth, (parameter, place) in enumerate(zip(self.parameters, self._places, strict=True)):
            gradient = Place(place.shape, (place.offset + nth) % 4, place.channels_last)
            parameter.grad = gradient.filled(self._draw, device=self._device)
            if nth in without:
                parameter.grad = None
            elif value is not None and parameter.dim() == 1 and parameter.numel():
                parameter.grad[-1] = value

    def gradients(self) -> list[Tensor]:
        """Return the gradients there are."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def gradient_sum(self, *, clip: float = 0.0) -> GradientSum:
        """Return what divides and clips the gradients."""
        named = {str(nth): parameter for nth, parameter in enumerate(self.parameters)}
        return GradientSum(named, torch.device(self._device), clip=clip, loss_scale=self.scale)

    def counted(self, total: GradientSum, *, images: int = 12, normaliser: float = 37.5) -> GradientSum:
        """Let a batch of so many images be added up."""
        zero = torch.zeros((), device=self._device)
        total.add(LossSums(box=zero, cls=zero, dfl=zero, normaliser=zero + normaliser), images)
        return total

    def groups(self) -> list[dict[str, object]]:
        """Return three groups of unlike decay, as far as there are parameters."""
        decays = (0.0, 0.1, 0.01)
        groups = [{"params": self.parameters[nth::3], "weight_decay": decay} for nth, decay in enumerate(decays)]
        return [group for group in groups if group["params"]]

    def optimizer(self, name: str) -> Optimizer:
        """Return an optimiser whose groups have rates of their own."""
        made: Optimizer = (
            AdamW(self.groups(), lr=0.1, betas=(0.9, 0.999))
            if name == "AdamW"
            else Sgd(self.groups(), lr=0.1, momentum=0.9, nesterov=name == "SGD")
        )
        for nth, group in enumerate(made.param_groups):
            group["lr"].fill_(0.1 / (1 + nth))
            if "momentum" in group:
                group["momentum"].fill_(0.9 - 0.1 * nth)
        return made

    def state(self, optimizer: Optimizer) -> list[Tensor]:
        """Return copies of all that an optimiser changes."""
        entries = [value for parameter in self.parameters for value in optimizer.state[parameter].values()]
        return [value.detach().clone() for value in (*self.parameters, *entries)]


class Watched(nn.Module):
    """Parameters and buffers, two counts among these."""

    def __init__(self, parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor] = ()) -> None:
        super().__init__()
        for nth, parameter in enumerate(parameters):
            self.register_parameter(f"weight{nth}", parameter)
        for nth, buffer in enumerate(buffers):
            self.register_buffer(f"value{nth}", buffer)
        device = parameters[0].device
        self.register_buffer("batches", torch.tensor(3, device=device))
        self.register_buffer("others", torch.tensor(2**40 + 1, device=device))

    @torch.no_grad()
    def change(self, draw: torch.Generator) -> None:
        """Change all, as an update and a batch do."""
        for value in (*self.parameters(), *self.buffers()):
            value.add_(torch.randn(value.shape, generator=draw) if value.is_floating_point() else 2)


OPTIMIZERS = ("SGD", "SGD without nesterov", "AdamW")


def updated(listed: Listed, name: str) -> list[list[Tensor]]:
    """Take five updates, the third of which is left out and the fourth is without some gradients."""
    optimizer, states = listed.optimizer(name), []
    for number in range(5):
        listed.give_gradients(without=(0, 3) if number == 3 else ())
        optimizer.found_inf = torch.full((), float(number == 2), device=listed.parameters[0].device)
        optimizer.step()
        optimizer.zero_grad()
        states.append(listed.state(optimizer))
    return states
