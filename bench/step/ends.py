"""The last convolutions of a head and the join of their points on a GPU: by torch, and by kernels.

    python bench/step/ends.py [--models yolo11n yolo11m yolo11x] [--imgsz 640] [--batch 64] [--limit 15]

Needs a CUDA device. For each unlike kind of branch, in bfloat16 and channels-last, microseconds of all three levels one
after the other: forward by torch (bias rounded, convolution, join) and by kernels; backward the gradients of the maps
(torch: with the copy and the sums of `fused_bias.py` before them) and of weights and biases; beside them what the bytes
take at `--rate`. Kernels go with the tiles that are chosen, and with others as long as `--limit` seconds leave room;
the best is named. All are compiled first, in threads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from convolutions import time_of
from torch.nn import functional as F

from paceline.models.operations import fused_ends
from paceline.models.operations.fused_bias import sums_over_cells
from paceline.models.operations.fused_ends import Tile, tile_of_product, tile_of_weight
from paceline.models.registry import build_model
from paceline.triton_kernels import cdiv, compiled_ahead

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

BEGIN = time.perf_counter()
CALLS, ROUNDS = 4, 3
NUM_CLASSES = 80
PASSES = ("forward", "maps", "weights")


@dataclass(frozen=True)
class Kind:
    """A kind of branch at its end."""

    num_in: int
    num_out: int


def kinds_of(model: str) -> list[Kind]:
    """Return those of the boxes and of the classes."""
    head: Any = build_model(model, NUM_CLASSES).to("meta").nodes[-1].module
    ends = (head.cv2[0][-1], head.cv3[0][-1])
    return [Kind(end.in_channels, end.out_channels) for end in ends]


class Work:
    """Maps, weights and joined points of one kind, and what is done with them."""

    def __init__(self, kind: Kind, batch: int, imgsz: int, device: str = "cuda") -> None:
        layout: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.sides = [imgsz // stride for stride in (8, 16, 32)]
        self.cells = [side * side for side in self.sides]
        self.maps = [torch.randn(batch, side, side, kind.num_in, **layout).permute(0, 3, 1, 2) for side in self.sides]
        self.weights = [torch.randn(kind.num_out, kind.num_in, 1, 1, **layout) / kind.num_in**0.5 for _ in self.sides]
        self.biases = [torch.randn(kind.num_out, device=device) for _ in self.sides]
        self.joined = torch.empty(batch, sum(self.cells), kind.num_out, **layout)
        self.of_joined = torch.randn(batch, sum(self.cells), kind.num_out, **layout)
        self.of_maps = [torch.empty_like(values) for values in self.maps]
        self.gigabytes = self.joined.numel() * (1 + kind.num_in / kind.num_out) * 2e-9
        """That each pass has to read or write."""

    def by_torch(self) -> dict[str, Callable[[], Any]]:
        """Give what is done without the kernels, by the name of each part."""
        rest = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
        pieces = [
            piece.transpose(1, 2).unflatten(2, (side, side))
            for piece, side in zip(self.of_joined.split(self.cells, dim=1), self.sides, strict=True)
        ]
        compact = [piece.contiguous(memory_format=torch.channels_last) for piece in pieces]
        levels = list(zip(compact, self.maps, self.weights, strict=True))

        def forward() -> Tensor:
            maps = [
                F.conv2d(x, weight, bias.bfloat16())
                for x, weight, bias in zip(self.maps, self.weights, self.biases, strict=True)
            ]
            return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)

        def backward(*mask: bool) -> list[Any]:
            return [torch.ops.aten.convolution_backward(*three, None, *rest, list(mask)) for three in levels]

        def maps() -> list[Any]:
            return [*map(sums_over_cells, pieces), *backward(True, False, False)]

        return {"forward": forward, "maps": maps, "weights": lambda: backward(False, True, False)}

    def by_kernels(self) -> dict[str, Callable[[Tile | None], Any]]:
        """Give what kernels do, by the pass."""
        joined, of_joined = (values.split(self.cells, dim=1) for values in (self.joined, self.of_joined))
        maps, of_maps = ([fused_ends._cells_of(x) for x in values] for values in (self.maps, self.of_maps))
        factors = [weight.flatten(1) for weight in self.weights]
        ends = list(zip(maps, factors, self.biases, joined, strict=True))
        backs = list(zip(of_joined, factors, of_maps, strict=True))
        sums = list(zip(of_joined, maps, strict=True))
        multiply, summed = fused_ends.multiply, fused_ends.sums_of_products
        return {
            "forward": lambda tile: [multiply(*four, turned=False, tile=tile) for four in ends],
            "maps": lambda tile: [
                multiply(given, factor, None, found, turned=True, tile=tile) for given, factor, found in backs
            ],
            "weights": lambda tile: [summed(*two, torch.float32, tile) for two in sums],
        }


def tiles_of(name: str, kind: Kind) -> list[Tile]:
    """Return the chosen tile of a pass, and then others."""
    if name == "weights":
        chosen = tile_of_weight(kind.num_out, kind.num_in)
        others = [replace(chosen, programs=132), replace(chosen, programs=528), replace(chosen, depth=128, stages=2)]
        others += [replace(chosen, warps=12 - chosen.warps), replace(chosen, depth=32, stages=4)]
        if kind.num_in > 128:
            others.append(replace(chosen, columns=256, warps=8))
    else:
        num_found, num_summed = (kind.num_out, kind.num_in) if name == "forward" else (kind.num_in, kind.num_out)
        chosen = tile_of_product(num_found, num_summed)
        whole = next(depth for depth in (64, 32, 16, 8) if num_summed % depth == 0)
        columns, more = chosen.columns, chosen.more
        others = [
            replace(chosen, warps=12 - chosen.warps),
            replace(chosen, rows=256, warps=8),
            replace(chosen, rows=64, warps=4),
            replace(chosen, depth=max(whole, 16), stages=min(num_summed // whole, 4)),
            replace(chosen, depth=128, stages=cdiv(num_summed, 128)),
        ]
        if more:
            others.append(replace(chosen, columns=2 * columns, more=0, warps=8))
        elif num_found > columns:
            others.append(replace(chosen, columns=256, warps=8))
    return list(dict.fromkeys((chosen, *others)))


def microseconds_of(work: Callable[[], Any]) -> float:
    return 1e3 * time_of(work, calls=CALLS, rounds=ROUNDS)


def compile_all(kinds: list[Kind], imgsz: int, threads: int) -> None:
    """Compile all tiles of all kinds, on maps without numbers."""
    with compiled_ahead(threads):
        for kind in kinds:
            for name, of_tile in Work(kind, 2, imgsz, "meta").by_kernels().items():
                for tile in tiles_of(name, kind):
                    of_tile(tile)


def measured(kind: Kind, options: argparse.Namespace) -> dict[str, Any]:
    """Print a line for each pass of a kind; give microseconds by pass and way, and those of each tile."""
    work = Work(kind, options.batch, options.imgsz)
    by_torch, by_kernels = work.by_torch(), work.by_kernels()
    found: dict[str, Any] = {"bytes": round(1e3 * work.gigabytes / options.rate, 1)}
    for name in PASSES:
        of_tile = by_kernels[name]
        figures = {"torch": microseconds_of(by_torch[name])}
        tiles: dict[str, Any] = {}
        for tile in tiles_of(name, kind):
            if tiles and time.perf_counter() - BEGIN > options.limit:
                tiles["not tried"] = tiles.get("not tried", 0) + 1
                continue
            try:
                tiles[word(tile)] = round(microseconds_of(lambda: of_tile(tile)), 1)  # noqa: B023
            except RuntimeError as error:  # more shared memory than there is
                tiles[word(tile)] = str(error)[:80]
        times = {label: took for label, took in tiles.items() if isinstance(took, float)}
        best = min(times, key=lambda label: times[label])
        figures |= {"chosen": next(iter(times.values())), "best": times[best]}
        found[name] = {label: round(took, 1) for label, took in figures.items()} | {"tiles": tiles}
        line = "  ".join(f"{label} {took:.0f}" for label, took in figures.items())
        print(
            f"{kind.num_in:4d} -> {kind.num_out:3d} {name:8s} bytes {found['bytes']:.0f}  {line} by {best}", flush=True
        )
    return found


def word(tile: Tile) -> str:
    return (
        f"{tile.rows}x{tile.columns}+{tile.more}x{tile.depth}/w{tile.warps}s{tile.stages}"
        f"{'' if tile.more else f'p{tile.programs}'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["yolo11n", "yolo11m", "yolo11x"])
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--limit", type=float, default=15.0, help="seconds after which no other tile is tried")
    parser.add_argument("--rate", type=float, default=4.2, help="TB/s of the device's memory")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("This bench needs a CUDA GPU.", file=sys.stderr)
        return 2
    of_models = {model: kinds_of(model) for model in options.models}
    kinds = list(dict.fromkeys(kind for found in of_models.values() for kind in found))
    compile_all(kinds, options.imgsz, options.threads)
    print(f"compiled after {time.perf_counter() - BEGIN:.1f} s", flush=True)
    found = {f"{kind.num_in} to {kind.num_out}": measured(kind, options) for kind in kinds}
    models = {model: [f"{kind.num_in} to {kind.num_out}" for kind in them] for model, them in of_models.items()}
    gpu = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(gpu | {"models": models, "us": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
