"""The 1 x 1 convolutions over several maps of one network on a GPU: by torch, joined, and by kernels that do not join.

    python bench/step/joints.py [--models yolo11n yolo11m] [--imgsz 640] [--batch 64] [--processes 12]

Needs a CUDA device. For each unlike one, in bfloat16 and channels-last: how often it is there, and microseconds of one
by torch (the join; forward, gradient of the joined map, its slices made maps of their own, gradient of the weight, by
cuDNN, and that gradient by a product of matrices) and by kernels (forward, gradients of the maps, gradient of the
weight) with the tiles that are chosen, and with the best of those tried, which is named. First all are compiled, in
several processes. The last line is JSON: milliseconds of all of a network, and of each tile in its pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from convolutions import time_of
from torch.nn import functional as F

from paceline.models import blocks
from paceline.models.operations import fused_joint
from paceline.models.operations.fused_joint import Tile, tile_of_map, tile_of_weight
from paceline.models.operations.pitch import Layout
from paceline.models.registry import build_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

DEVICE = torch.device("cuda")
CALLS, ROUNDS = 4, 3
PASSES = ("result", "pieces", "weight")
MAP_TILES = [
    Tile(rows=rows, columns=columns, depth=64, warps=warps, stages=stages)
    for rows, columns, warps, stages in [
        (64, 64, 4, 1),
        (128, 64, 4, 1),
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (256, 64, 8, 1),
        (128, 128, 4, 2),
        (128, 128, 8, 1),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 128, 8, 4),
        (128, 256, 8, 1),
        (128, 256, 8, 3),
    ]
]
WEIGHT_TILES = [
    Tile(rows=rows, columns=columns, depth=depth, warps=warps, stages=stages, programs=programs)
    for (rows, columns, depth, warps, stages), programs in product(
        [
            (64, 64, 64, 4, 3),
            (64, 64, 128, 4, 3),
            (64, 128, 64, 4, 3),
            (128, 64, 64, 4, 3),
            (128, 128, 64, 8, 3),
            (128, 256, 64, 8, 3),
        ],
        (132, 264, 528),
    )
]


@dataclass(frozen=True)
class Join:
    """One convolution over several maps."""

    widths: tuple[int, ...]
    out_channels: int
    height: int
    width: int


def joins_of(model: str, imgsz: int, batch: int) -> Counter[Join]:
    """Count the convolutions over several maps."""
    found: Counter[Join] = Counter()
    convolved = blocks.convolved_jointly

    def noted(convolution: nn.Conv2d, maps: Sequence[Tensor]) -> Tensor:
        if len(maps) > 1:
            height, width = maps[0].shape[2:]
            found[Join(tuple(values.shape[1] for values in maps), convolution.out_channels, height, width)] += 1
        return convolved(convolution, maps)

    blocks.convolved_jointly = noted
    try:
        build_model(model, 80).to("meta")(torch.empty(batch, 3, imgsz, imgsz, device="meta"))
    finally:
        blocks.convolved_jointly = convolved
    return found


class Work:
    """The maps of a join, and what is done with them."""

    def __init__(self, join: Join, batch: int) -> None:
        layout: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
        shape = (batch, join.height, join.width)
        maps = [torch.randn(*shape, channels, **layout).permute(0, 3, 1, 2) for channels in join.widths]
        num_in = sum(join.widths)
        self.maps = maps
        self.weight = torch.randn(join.out_channels, num_in, 1, 1, **layout) / num_in**0.5
        self.of_weight = self.weight.float()
        self.factors = self.weight.flatten(1)
        self.of_y = torch.randn(*shape, join.out_channels, **layout).permute(0, 3, 1, 2)
        self.joined = torch.cat(maps, dim=1)

    def backward(self, *mask: bool) -> tuple[Tensor, ...]:
        """Gradients by cuDNN."""
        rest = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            self.of_y, self.joined, self.weight, None, *rest, list(mask)
        )
        return found

    def slices(self) -> list[Tensor]:
        """Make the slices of a joined map maps of their own."""
        widths = [values.shape[1] for values in self.maps]
        return [part.contiguous(memory_format=torch.channels_last) for part in self.joined.split(widths, dim=1)]

    def by_torch(self) -> dict[str, Callable[[], Any]]:
        """Give what torch does, by the name of each part."""
        rows, rows_of_y = (values.permute(0, 2, 3, 1).flatten(0, 2) for values in (self.joined, self.of_y))
        return {
            "join": lambda: torch.cat(self.maps, dim=1),
            "forward": lambda: F.conv2d(self.joined, self.weight),
            "map": lambda: self.backward(True, False, False),
            "slices": self.slices,
            "weight": lambda: self.backward(False, True, False),
            "weight by matrices": lambda: rows_of_y.T @ rows,
        }

    def by_kernels(self) -> dict[str, Callable[[Tile | None], Any]]:
        """Give what kernels do, by the pass."""
        return {
            "result": lambda tile: fused_joint.product(self.factors, self.maps, tile),
            "pieces": lambda tile: fused_joint.gradients_of_maps(self.factors, self.of_y, self.maps, tile),
            "weight": lambda tile: fused_joint.gradient_of_weight(
                Layout.of(self.of_weight), self.of_y, self.maps, tile
            ),
        }


def tiles_of(name: str) -> list[Tile]:
    return WEIGHT_TILES if name == "weight" else MAP_TILES


def chosen_of(name: str, join: Join) -> Tile:
    num_in = sum(join.widths)
    if name == "weight":
        return tile_of_weight(join.out_channels, num_in)
    return tile_of_map(*((join.out_channels, num_in) if name == "result" else (num_in, join.out_channels)))


def microseconds_of(work: Callable[[], Any]) -> float:
    return 1e3 * time_of(work, calls=CALLS, rounds=ROUNDS)


def compile_some(joins: set[Join], number: int, processes: int) -> None:
    """Compile each so many-th way, on maps of few cells."""
    rooms = {len(join.widths) > 4: join for join in joins}  # all up to four are compiled as four
    ways = [
        (name, tile, join)
        for name in ("result", "pieces", "weight")
        for tile in tiles_of(name)
        for join in rooms.values()
    ]
    ways += [(name, chosen_of(name, join), join) for name in ("result", "pieces", "weight") for join in joins]
    distinct = {
        (name, len(join.widths) > 4, tile.rows, tile.columns, tile.depth, tile.warps, tile.stages): (name, tile, join)
        for name, tile, join in ways
    }
    for name, tile, join in list(distinct.values())[number::processes]:
        small = Join(join.widths, join.out_channels, 16, 16)
        Work(small, 1).by_kernels()[name](tile)


def measured(model: str, joins: Counter[Join], batch: int) -> dict[str, Any]:
    """Print a line for each join; give the sums over the network in milliseconds."""
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    of_tiles: dict[str, Counter[str]] = defaultdict(Counter)
    for join, count in sorted(joins.items(), key=lambda item: -item[0].height):
        work = Work(join, batch)
        cells = [f"{join.widths} -> {join.out_channels} at {join.height} x {join.width}, x{count}: torch"]
        for name, call in work.by_torch().items():
            took = microseconds_of(call)
            sums["torch"][name] += count * took / 1e3
            cells.append(f"{name} {took:.0f}")
        cells.append("| kernels")
        for name, of_tile in work.by_kernels().items():
            chosen = microseconds_of(lambda: of_tile(None))  # noqa: B023
            found = {tile: microseconds_of(lambda: of_tile(tile)) for tile in tiles_of(name)}  # noqa: B023
            best = min(found, key=lambda tile: found[tile])
            sums["chosen"][name] += count * chosen / 1e3
            sums["best"][name] += count * min(chosen, found[best]) / 1e3
            for tile, took in found.items():
                of_tiles[name][word(tile)] += count * took / 1e3
            cells.append(f"{name} {chosen:.0f} (best {found[best]:.0f} by {word(best)})")
        print("  ".join(cells), flush=True)
    return {"model": model, "ms": sums, "ms of tiles": of_tiles}


def word(tile: Tile) -> str:
    return f"{tile.rows}x{tile.columns}x{tile.depth}/w{tile.warps}s{tile.stages}p{tile.programs}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["yolo11n", "yolo11m"])
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--compile", type=int, help="compile each so many-th way only; for processes of this script")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("This bench needs a CUDA GPU.", file=sys.stderr)
        return 2
    joins = {model: joins_of(model, options.imgsz, options.batch) for model in options.models}
    if options.compile is not None:
        compile_some({join for found in joins.values() for join in found}, options.compile, options.processes)
        return 0
    words = [sys.executable, __file__, *sys.argv[1:]]
    others = [subprocess.Popen([*words, "--compile", str(number)]) for number in range(options.processes)]
    for other in others:
        other.wait()
    figures = [measured(model, found, options.batch) for model, found in joins.items()]
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "models": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
