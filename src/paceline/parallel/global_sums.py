"""Loss sums of all ranks: five numbers that travel while the backward pass goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from paceline.losses.detection import LossSums

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


class GlobalSums:
    """Sums of one batch on their way to all ranks of a group."""

    def __init__(self, sums: LossSums, images: int, group: ProcessGroup) -> None:
        """Send this rank's sums; every rank of the group has to do the same."""
        with torch.no_grad():
            parts = (sums.box, sums.cls, sums.dfl, sums.normaliser)
            number = torch.full((), float(images), dtype=sums.box.dtype, device=sums.box.device)
            self._values = torch.stack([*(part.detach() for part in parts), number])
        self._work = dist.all_reduce(self._values, group=group, async_op=True)

    def wait(self) -> tuple[LossSums, Tensor]:
        """Return the sums of all ranks and the number of their images, once they are there."""
        if self._work is not None:
            self._work.wait()
        box, cls, dfl, normaliser, images = self._values.unbind()
        return LossSums(box=box, cls=cls, dfl=dfl, normaliser=normaliser), images
