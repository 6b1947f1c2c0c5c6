"""What the ranks of a world do where one of them cannot draw or decode on its device."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from engine_cases import from_all

from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.device import choice, decoding
from paceline.data.device.reference import render_reference
from paceline.data.loader import TrainLoader
from paceline.errors import UserError
from paceline.parallel.gather import from_first, of_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CUDA = torch.device("cuda")


def choose(
    data: Path, *, what: str, unable: tuple[int, ...], render: str = "auto", decode: str = "host", mistake: bool = True
) -> list[Any]:
    """Choose for a GPU that is not there, on all ranks; returns what each was told, or chose."""

    def renderer_of(device: torch.device) -> object:
        require("renderer")
        return render_reference

    def codec(*_: object) -> object:
        require("codec")
        return object()

    def require(name: str) -> None:
        if name == what and dist.get_rank() in unable:
            raise UserError("It needs Triton.") if mistake else RuntimeError("a defect")

    def faster(loader: TrainLoader, drawn: object, *rest: Any) -> object:
        agree: Callable[[bool], bool] = rest[-1]
        return drawn if agree(True) else loader

    index = open_data_set(DataConfig(data=str(data)), seed=0).train
    assert index is not None
    config = DataConfig(imgsz=64, batch=2, workers=1, cache="none")
    rank = dist.get_rank()
    with contextlib.ExitStack() as stack:
        loader = stack.enter_context(TrainLoader(index, config, AugmentConfig(), 0, rank=rank, world=2))
        for owner, name, value in (
            (choice, "renderer_of", renderer_of),
            (choice, "DeviceLoader", lambda *_, **__: "the device"),
            (choice, "_faster", faster),
            (decoding, "NvImageCodec", codec),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(decoding.choose_codec.__kwdefaults__, make=codec))
        try:
            found: Any = choice.choose_training_data(
                loader, render, CUDA, torch.float32, upload=False, decode=decode, agree=from_first, gather=of_all
            )
            told = "the host" if found is loader else found
        except (UserError, RuntimeError) as error:
            told = f"{type(error).__name__}: {error}"
    return from_all(told)
