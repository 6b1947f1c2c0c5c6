"""Pools, sums for biases and upsampling by our kernels and by torch, on a GPU, in the sizes of yolo11n at 640 px.

    python bench/step/pools.py [--batch 64] [--dtype bfloat16] [--sweep] [--only pools]

Each is captured in a CUDA graph, ten times in a row, and replayed; microseconds are medians over replays. GB/s are
those of what has to be read and written once, by ours. Without `--sweep`, ours are launched as in a training; with it,
with other tiles and warps too, which takes longer, since each is compiled. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

IN_A_ROW, REPLAYS = 10, 20


def timed_us(work: Callable[[], Any], stream: torch.cuda.Stream) -> float:
    """Return how long a piece of work takes on the device, in a graph."""
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(IN_A_ROW):
                work()
        graph.replay()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
        for start, end in pairs:
            start.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs) / IN_A_ROW


def both_passes(
    operation: Callable[[Tensor], Tensor], x: Tensor, of_y: Tensor, stream: torch.cuda.Stream
) -> list[float]:
    """Time forward and backward, each alone."""
    with torch.cuda.stream(stream):
        leaf = x.detach().requires_grad_()
        y = operation(leaf)
    forward_us = timed_us(lambda: operation(leaf), stream)
    return forward_us, timed_us(lambda: torch.autograd.grad(y, leaf, of_y, retain_graph=True), stream)


def random_map(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)


def pools_by_torch(x: Tensor) -> Tensor:
    """Join a map with three pools, each of the one before."""
    pieces = [x]
    for _ in range(3):
        pieces.append(F.max_pool2d(pieces[-1], 5, 1, 2))
    return torch.cat(pieces, dim=1)


class Table:
    """Rows of what was measured, printed as they come."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    def add(self, name: str, figures: dict[str, float]) -> None:
        """Print a row and keep it."""
        self.rows[name] = {key: round(value, 2) for key, value in figures.items()}
        print(f"{name:58}  " + "  ".join(f"{key} {value:9.2f}" for key, value in figures.items()), flush=True)


def measure_pools(table: Table, options: argparse.Namespace, dtype: torch.dtype, stream: torch.cuda.Stream) -> None:
    """Time three pools of 5x5 and their join."""
    from paceline.models.operations.fused_pool import BACKWARD, FORWARD, Tile, pyramid
    from paceline.triton_kernels import compiled_ahead

    x, of_joined = (random_map(options.batch, width, 20, 20, dtype=dtype) for width in (128, 512))
    passes = both_passes(pools_by_torch, x, of_joined, stream)
    table.add("pools and join, torch", {"forward us": passes[0], "backward us": passes[1]})
    ways = [(FORWARD, BACKWARD)]
    if options.sweep:
        sizes = itertools.product((2, 4, 5), ((256, 1), (512, 2), (512, 4), (1024, 4)))
        tiles = [Tile(rows=rows, numbers=numbers, warps=warps) for rows, (numbers, warps) in sizes]
        ways += [(tile, tile) for tile in tiles]
        with compiled_ahead(os.cpu_count() or 1):  # all at once; one by one they would take minutes
            small = torch.empty(x.shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
            for tile, gradient_tile in ways:
                joined = pyramid(small.requires_grad_(), 3, tile=tile, gradient_tile=gradient_tile)
                joined.backward(torch.empty_like(joined))
    for tile, gradient_tile in ways:
        ours = functools.partial(pyramid, pools=3, tile=tile, gradient_tile=gradient_tile)
        passes = both_passes(ours, x, of_joined, stream)
        name = f"pools and join, ours {tile} {gradient_tile if gradient_tile != tile else ''}"
        table.add(name.replace("Tile", ""), {"forward us": passes[0], "backward us": passes[1]})


def measure_sums(table: Table, options: argparse.Namespace, dtype: torch.dtype, stream: torch.cuda.Stream) -> None:
    """Sum the gradient of joined points, and copy it, as torch's convolution does too."""
    from paceline.models.operations.fused_bias import LAUNCH, Launch, sums_over_cells

    ways = [LAUNCH]
    if options.sweep:
        sizes = itertools.product((2048, 4096), (1024, 2048), (4, 8), (False, True))
        ways += [
            Launch(tile=tile, programs=programs, warps=warps, whole=whole) for tile, programs, warps, whole in sizes
        ]
    for channels, side in itertools.product((64, 80), (80, 40, 20)):
        points = torch.randn(options.batch, 8400, channels, device="cuda").to(dtype)
        piece = points[:, : side * side].transpose(1, 2).unflatten(2, (side, side))
        gigabytes = 2 * piece.numel() * piece.element_size() / 1e9
        name = f"sums over {side}x{side} of {channels}"
        table.add(f"{name}, torch", {"us": timed_us(functools.partial(by_torch, piece), stream)})
        for launch in ways if side == 80 else ways[:1]:
            us = timed_us(functools.partial(sums_over_cells, piece, launch=launch), stream)
            table.add(f"{name}, ours {launch}".replace("Launch", ""), {"us": us, "GB/s": 1e6 * gigabytes / us})


def by_torch(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Copy and sum as torch's backward pass of a convolution does."""
    return gradient.contiguous(memory_format=torch.channels_last), gradient.sum((0, 2, 3))


def measure_doubling(table: Table, options: argparse.Namespace, dtype: torch.dtype, stream: torch.cuda.Stream) -> None:
    """Time both of the network, with gradients that are pieces of joined maps."""
    from paceline.models.operations.doubling import BACKWARD, FORWARD, Tile, doubled_map

    ways = [(FORWARD, BACKWARD)]
    if options.sweep:
        tiles = [Tile(numbers=numbers, warps=warps) for numbers in (512, 1024, 2048, 4096) for warps in (2, 4, 8)]
        ways += [(tile, tile) for tile in tiles]
    for channels, side in ((256, 20), (128, 40)):
        x = random_map(options.batch, channels, side, side, dtype=dtype)
        of_doubled = random_map(options.batch, channels + 128, 2 * side, 2 * side, dtype=dtype)[:, :channels]
        gigabytes = 5 * x.numel() * x.element_size() / 1e9
        name = f"twice {side}x{side} of {channels}"
        passes = both_passes(lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), x, of_doubled, stream)
        table.add(f"{name}, torch", {"forward us": passes[0], "backward us": passes[1]})
        for tile, gradient_tile in ways:
            ours = functools.partial(doubled_map, tile=tile, gradient_tile=gradient_tile)
            passes = both_passes(ours, x, of_doubled, stream)
            figures = {"forward us": passes[0], "backward us": passes[1]}
            figures |= {"forward GB/s": 1e6 * gigabytes / passes[0], "backward GB/s": 1e6 * gigabytes / passes[1]}
            table.add(f"{name}, ours {tile}".replace("Tile", ""), figures)


MEASURED = {"pools": measure_pools, "sums": measure_sums, "doubling": measure_doubling}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--sweep", action="store_true", help="other tiles and warps too")
    parser.add_argument("--only", nargs="+", default=list(MEASURED), choices=list(MEASURED))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("This bench needs a CUDA GPU.", file=sys.stderr)
        return 2
    dtype: torch.dtype = getattr(torch, options.dtype)
    stream = torch.cuda.Stream()
    table = Table()
    for name in options.only:
        MEASURED[name](table, options, dtype, stream)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **vars(options)} | table.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
