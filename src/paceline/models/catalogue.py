"""The catalogue: every network that can be built, with its published figures. Never imports torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from paceline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is known of a network with 80 classes before it is built."""

    name: str
    family: str
    size: str
    """One of n, s, m, l, x."""
    params: int
    """Parameters while training, the fixed ones of the distribution's bins included."""
    params_fused: int
    """Parameters once every batch norm is folded into its convolution."""
    gflops: float
    """10^9 operations for one image of 640 x 640: twice the multiply-adds of the convolutions."""
    published_ap: float
    """COCO val2017 AP50-95 in percent at 640 px, as the authors of the network publish it; not measured here."""


def _family(family: str, *rows: tuple[str, int, int, float, float]) -> tuple[ModelInfo, ...]:
    return tuple(
        ModelInfo(
            name=family + size,
            family=family,
            size=size,
            params=params,
            params_fused=params_fused,
            gflops=gflops,
            published_ap=published_ap,
        )
        for size, params, params_fused, gflops, published_ap in rows
    )


CATALOGUE: tuple[ModelInfo, ...] = (
    #                   size    params      fused  gflops    AP
    *_family(
        "yolov8",
        ("n", 3_157_200, 3_151_904, 8.7, 37.3),
        ("s", 11_166_560, 11_156_544, 28.6, 44.9),
        ("m", 25_902_640, 25_886_080, 78.9, 50.2),
        ("l", 43_691_520, 43_668_288, 165.2, 52.9),
        ("x", 68_229_648, 68_200_608, 257.8, 53.9),
    ),
    *_family(
        "yolo11",
        ("n", 2_624_080, 2_616_248, 6.5, 39.5),
        ("s", 9_458_752, 9_443_760, 21.5, 47.0),
        ("m", 20_114_688, 20_091_712, 68.0, 51.5),
        ("l", 25_372_160, 25_340_992, 86.9, 53.4),
        ("x", 56_966_176, 56_919_424, 194.9, 54.7),
    ),
)


_OTHER_TASKS = ("-seg", "-pose", "-obb", "-cls", "-sem", "-depth")
"""Endings that other YOLO trainers give to the names of networks for other tasks."""


def model_names() -> tuple[str, ...]:
    """Names that `find_model` knows, in the order of the catalogue."""
    return tuple(info.name for info in CATALOGUE)


def find_model(name: str) -> ModelInfo:
    """Look a network up by its exact name.

    Raises `UserError` for any other name, with the nearest one that exists.
    """
    for info in CATALOGUE:
        if info.name == name:
            return info
    if name.lower().endswith(_OTHER_TASKS):
        raise UserError(f'The model "{name}" is for another task, and only detection is offered; leave its ending out.')
    if name.lower().startswith("yolo26"):
        raise UserError(f'The model "{name}" is not there yet; choose one of {", ".join(model_names())}.')
    sizes = [entry for entry in model_names() if entry[:-1] == name.lower()]  # a family: its smallest network
    close = sizes[:1] or difflib.get_close_matches(name.lower(), model_names(), n=1, cutoff=0.5)
    mend = f'did you mean "{close[0]}"?' if close else f"choose one of {', '.join(model_names())}."
    raise UserError(f'There is no model "{name}": {mend}')
