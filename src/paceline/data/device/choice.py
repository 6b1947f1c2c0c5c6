"""Choice: whether the host or the device decodes and draws, by measurement where nobody has said it."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import TYPE_CHECKING, Literal

import torch

from paceline.data.device.decoding import choose_codec, give_back
from paceline.data.device.loader import DeviceLoader
from paceline.data.device.on_all import NowhereError, alone, on_all
from paceline.data.device.reference import render_reference
from paceline.data.device.window import window_bytes
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from paceline.batch import Batch
    from paceline.data.device.codec import Codec
    from paceline.data.device.decoding import Decode
    from paceline.data.device.feeder import Renderer
    from paceline.data.loader import TrainLoader

log = logging.getLogger("paceline")

Render = Literal["auto", "host", "device"]

_MEASURED_BATCHES = 8
_SHARE_FOR_WINDOW = 0.1
"""Of the device's free memory, what `auto` takes for images that are decoded as they come: the network needs more."""


def renderer_of(device: torch.device) -> Renderer:
    """Return what draws on a device: the kernel on CUDA, the slow reference elsewhere. Raises UserError."""
    if device.type != "cuda":
        return render_reference
    try:
        from paceline.data.device.kernel import render_by_kernel
    except ImportError as error:
        raise UserError(
            f"render=device needs Triton, which cannot be imported ({error}); install it, or choose render=host."
        ) from error
    return render_by_kernel


def choose_training_data(
    loader: TrainLoader,
    render: Render,
    device: torch.device,
    dtype: torch.dtype,
    *,
    upload: bool,
    decode: Decode = "auto",
    sharing: int = 1,
    agree: Callable[[bool], bool] = bool,
    gather: Callable[[str], Sequence[str]] = alone,
) -> TrainLoader | DeviceLoader:
    """Return the loader itself, or one that draws its pictures on `device`; says in the log which, and why.

    `upload` keeps the decoded set on the device, which then has to draw, and may decode it: see `choose_codec` for
    `decode` and `sharing`. Images that nobody keeps decoded it may decode as they come.

    agree: gives all ranks the verdict of one, whose measurement counts.
    gather: gives all ranks what each of them says, in their order. What one rank cannot do and others can ends all of
        them, by the same UserError: else the others would wait for its verdicts.
    """
    if decode == "device":
        _require_work(loader, render, upload=upload)
    if loader.transform and (render == "device" or upload):
        raise UserError("transform= is a function of yours that runs on the host: choose render=host or cache=auto.")
    if loader.transform:
        return loader
    if render == "host":
        if upload:
            raise UserError("cache=device needs render=device or render=auto: the host cannot draw what the GPU keeps.")
        return loader
    if device.type != "cuda":
        if decode == "device":
            choose_codec(loader, decode, device)  # says what is missing
        if render == "auto":
            return loader
        log.warning("render=device on a CPU draws by the slow reference, which is meant for tests; take render=host.")
    if upload:
        renderer = on_all(lambda: renderer_of(device), gather)
        codec = choose_codec(loader, decode, device, sharing=sharing, agree=agree, gather=gather)
        return DeviceLoader(loader, device, dtype, renderer, upload=True, codec=codec)
    try:
        renderer = on_all(lambda: renderer_of(device), gather)
    except NowhereError as error:
        if render == "device" or decode == "device":
            raise
        log.warning("%s The host draws the pictures.", error)
        return loader
    codec = _codec_of_stream(loader, decode, device, agree, gather)
    drawn = DeviceLoader(loader, device, dtype, renderer, codec=codec)
    if render == "device" or decode == "device":
        return drawn
    return _faster(loader, drawn, device, lambda: torch.cuda.synchronize(device), agree)


def _require_work(loader: TrainLoader, render: Render, *, upload: bool) -> None:
    """Raise UserError where decode=device would have nothing to decode."""
    if render == "host" or loader.transform:
        raise UserError(
            "decode=device is for pictures that the GPU draws, but "
            + ("transform= is a function of yours" if loader.transform else "render=host draws them")
            + " on the host: choose decode=host."
        )
    if not upload and loader.images.keeps_decoded:
        raise UserError(
            f"decode=device has nothing to do where cache={loader.images.shelf.tier} keeps the decoded images on the "
            "host: add cache=device, or cache=none, or choose decode=host."
        )


def _codec_of_stream(
    loader: TrainLoader,
    decode: Decode,
    device: torch.device,
    agree: Callable[[bool], bool],
    gather: Callable[[str], Sequence[str]] = alone,
) -> Codec | None:
    """Return what decodes images on the device as they come; None where the host does, or keeps them decoded.

    Ranks are asked alike, whatever their machines keep, for each waits for the verdict of one.
    """
    if loader.images.keeps_decoded:
        if decode == "auto" and device.type == "cuda":
            agree(False)
        return None
    return choose_codec(
        loader,
        decode,
        device,
        needed_bytes=window_bytes(loader),
        share_of_free=_SHARE_FOR_WINDOW,
        agree=agree,
        gather=gather,
    )


def _faster(
    loader: TrainLoader,
    drawn: DeviceLoader,
    device: torch.device,
    settle: Callable[[], None],
    agree: Callable[[bool], bool] = bool,
) -> TrainLoader | DeviceLoader:
    """Time both over the same first batches, after a pass over them that brings their images into the cache.

    Where the device decodes, what that pass has decoded is forgotten: both then decode the images that they draw. Who
    is not chosen holds no memory afterwards.
    """
    if loader.steps(0) <= 1:
        log.info("render=auto: %s draws; an epoch of one batch is too short to measure.", device)
        return drawn
    images_per_s(drawn.epoch(0, mosaic=True), settle)
    drawn.forget()
    host = images_per_s(_moved(loader, device), settle)
    on_device = images_per_s(drawn.epoch(0, mosaic=True), settle)
    chosen = drawn if agree(on_device >= host) else loader
    log.info(
        "render=auto: the host draws %s images/s, %s draws %s: %s does it.",
        f"{host:,.0f}",
        device,
        f"{on_device:,.0f}",
        device if chosen is drawn else "the host",
    )
    if chosen is loader:
        settle()
        drawn.let_go()
        give_back(device)
    elif drawn.decodes:
        loader.images.forget()
    return chosen


def images_per_s(stream: Generator[Batch, None, None], settle: Callable[[], None]) -> float:
    """Rate at which batches become ready, after the first; `settle` waits until the device has them."""
    count = 0
    with closing(stream):
        next(stream)
        settle()
        start = time.perf_counter()
        for _, batch in zip(range(_MEASURED_BATCHES), stream, strict=False):
            count += len(batch)
        settle()
    return count / max(time.perf_counter() - start, 1e-9)


def _moved(loader: TrainLoader, device: torch.device) -> Generator[Batch, None, None]:
    with closing(loader.epoch(0, mosaic=True)) as batches:
        for batch in batches:
            moved = batch.to(device, non_blocking=True)
            moved.network_input()
            yield moved
