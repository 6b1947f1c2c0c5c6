"""The fill rule: weights that hang on nothing but the keys of a network's state, and the input that goes with them."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.models.graph import DetectionModel

SIZE_HW = (96, 160)


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    pixels = np.random.default_rng(0).random((2, 3, *SIZE_HW), dtype=np.float32)
    return torch.from_numpy(pixels).to(dtype)


def filled(key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        values = np.zeros(shape)
    elif key.endswith("dfl.conv.weight"):
        values = np.arange(16.0).reshape(shape)
    elif key.endswith("running_var"):
        values = 1 + 0.1 * rng.random(shape)
    elif key.endswith(("running_mean", "bias")):
        values = 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1:
        values = 1 + 0.1 * rng.standard_normal(shape)
    else:
        gain = 8.0 if ".qkv.conv.weight" in key else 1.0
        values = gain * rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    return values.astype(np.float32)


def fill(model: DetectionModel) -> DetectionModel:
    state = {key: torch.from_numpy(filled(key, tuple(t.shape))) for key, t in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()
