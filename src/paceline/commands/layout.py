"""The layout of a run that is asked for: whether it is possible, and how many processes it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.commands.device import count_devices
from paceline.commands.resume import going_on
from paceline.errors import UserError
from paceline.option_values import AUTO_BATCH
from paceline.parallel.layout import Layout
from paceline.parallel.rank import rank_of_environment

if TYPE_CHECKING:
    from paceline.options import TrainOptions

ANY_NUMBER = 10**9
"""Of nodes, while the network is not there yet."""
ANY_BATCH = 64
"""Of a device, while nobody has measured how much it takes."""


def ranks_to_launch(options: TrainOptions) -> int:
    """Count the processes that have to be started for these options: 1 where this process is all, or one of them."""
    if rank_of_environment() is not None:
        return 1
    resumed, options = going_on(options, warns=False)
    count = count_devices(options.loop.device, options.ranks.devices)
    check_layout(options, count, goes_on=resumed is not None)
    return count


def _is_possible(options: TrainOptions, devices: int) -> bool:
    """Whether another batch would do."""
    batch = devices * options.parallel.microbatches * ANY_BATCH
    try:
        Layout.of(options.parallel, devices=devices, batch=batch, nodes=ANY_NUMBER)
    except UserError:
        return False
    return True


def check_layout(options: TrainOptions, devices: int, *, goes_on: bool = False) -> None:
    """Raise UserError at once, before anything is started or read, for a layout that is not possible.

    goes_on: whether the batch is that of a run that goes on, which keeps it.
    """
    is_auto, batch = options.data.batch == AUTO_BATCH, options.data.batch
    if is_auto:
        batch = devices * max(options.parallel.microbatches, ANY_BATCH)
    try:
        layout = Layout.of(options.parallel, devices=devices, batch=batch, nodes=ANY_NUMBER)
    except UserError as error:
        if goes_on and _is_possible(options, devices):
            raise UserError(
                f"{error} A run that goes on keeps its batch, so take another number of devices."
            ) from error
        raise
    if layout.pipeline > 1 and is_auto:
        raise UserError("batch=auto measures the whole network on one device, which stages are not; give a number.")
    if layout.pipeline > 1 and options.augment.multi_scale > 0:
        raise UserError("multi_scale changes the image size on the way, which stages cannot; leave one of them out.")
