"""Decoding: whether the host or the device decodes what the device draws from, by measurement where asked."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from paceline.data import room
from paceline.data.device.codec import NvImageCodec
from paceline.data.device.decode import BatchDecoder, batches, read
from paceline.data.device.on_all import alone, on_all
from paceline.data.images import BrokenImage
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.data.device.codec import Codec
    from paceline.data.loader import TrainLoader

log = logging.getLogger("paceline")

Decode = Literal["auto", "host", "device"]

_WARM_IMAGES = 8


def choose_codec(
    loader: TrainLoader,
    decode: Decode,
    device: torch.device,
    *,
    needed_bytes: int | None = None,
    share_of_free: float = 1.0,
    sharing: int = 1,
    agree: Callable[[bool], bool] = bool,
    gather: Callable[[str], Sequence[str]] = alone,
    make: Callable[[torch.device, int], Codec] = NvImageCodec,
) -> Codec | None:
    """Return what decodes images on a device, which `make` makes; None where the host does.

    Measured it is only where a share of the device's free memory holds `needed_bytes`, the whole set unless said
    otherwise. The host's rate counts `sharing` times: so many ranks of this machine decode a part each, where on
    devices each decodes all. `agree` gives all ranks the verdict of one, `gather` what each of them says. Raises
    UserError where decode=device is not possible.
    """
    if decode == "host":
        return None
    if device.type != "cuda":
        if decode == "auto":
            return None
        raise UserError("decode=device needs a CUDA device; choose decode=host.")
    if decode == "device":
        return on_all(lambda: make(device, loader.num_threads), gather)
    codec: Codec | None = None
    is_faster = False
    try:
        codec = make(device, loader.num_threads)
    except UserError as error:
        log.info("decode=auto: the host decodes. %s", error)
    needed = needed_bytes
    if needed is None:
        needed = room.decoded_bytes(loader.index.sizes, loader.images.reductions)
    free = share_of_free * torch.cuda.mem_get_info(device)[0]
    if codec is not None and needed > free:
        log.info(
            "decode=auto: the host decodes, for %s may need %.1f GB and has %.1f.", device, needed / 1e9, free / 1e9
        )
        codec = None
    if codec is not None:
        is_faster = faster_on_device(loader, codec, device, lambda: torch.cuda.synchronize(device), sharing)
    if agree(is_faster):
        return codec
    codec = None
    give_back(device)
    return None


def give_back(device: torch.device) -> None:
    """Give a GPU's memory that nothing uses any more to whoever asks for it next, in whatever stream.

    PyTorch keeps it for the stream that it was made in, which nobody works in after a trial.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()


def faster_on_device(
    loader: TrainLoader, codec: Codec, device: torch.device, settle: Callable[[], None], sharing: int = 1
) -> bool:
    """Time both over the same images, spread evenly over the set, from bytes in memory to pixels on the device.

    `settle` waits until the device has them. Says in the log what came out.
    """
    images = loader.images
    order = np.random.default_rng(0).permutation(len(loader.index))
    chosen = batches(order, loader.index.sizes[order])[0]
    with ThreadPoolExecutor(loader.num_threads, thread_name_prefix="paceline-data") as pool:
        pairs = zip(chosen, pool.map(lambda number: read(images, number), chosen), strict=True)
        files = {number: encoded for number, encoded in pairs if not isinstance(encoded, BrokenImage)}
        if not files:  # they are named when their turn comes
            return False
        decoder = BatchDecoder(loader, codec, device, pool)

        def by_device(numbers: list[int]) -> None:
            decoder.decode(numbers, [files[number] for number in numbers])

        def by_host(numbers: list[int]) -> None:
            for pixels in pool.map(lambda number: decoder.by_host(number, files[number]), numbers):
                if not isinstance(pixels, BrokenImage):
                    torch.from_numpy(pixels).to(device)

        rates, taken = [], 0
        for work in (by_host, by_device):
            work(list(files)[:_WARM_IMAGES])
            settle()
            taken = decoder.num_on_device
            start = time.perf_counter()
            work(list(files))
            settle()
            rates.append(len(files) / max(time.perf_counter() - start, 1e-9))
        taken = decoder.num_on_device - taken
    if 2 * taken < len(files):  # what is left is the host's work either way, with a detour
        log.info(
            "decode=auto: the host decodes, for %s takes %d of %d files that were tried.", device, taken, len(files)
        )
        return False
    host, on_device = rates[0] * sharing, rates[1]
    is_faster = on_device >= host
    log.info(
        "decode=auto: the host decodes %s images/s%s, %s decodes %s: %s does it.",
        f"{host:,.0f}",
        f" by {sharing} ranks" if sharing > 1 else "",
        device,
        f"{on_device:,.0f}",
        device if is_faster else "the host",
    )
    return is_faster
