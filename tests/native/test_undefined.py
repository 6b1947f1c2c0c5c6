"""The compiled code does nothing that C leaves undefined: built so that this stops it, it goes through what it is for.

What one compiler does as it was meant, the next one may not. Run as a script this file is the process that would stop.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
import torch

from paceline.models.operations.compiled_norm import activated_in_place, normed_and_activated
from paceline.native.compiled import FOLDER, Compiled
from paceline.native.jitter import jitter_by_kernel
from paceline.native.jpeg import JPEG, decode_at_level
from paceline.native.library import PIXELS
from paceline.native.norm import NORM
from paceline.native.picture import draw_pictures
from paceline.native.resample import resample_by_kernel

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable

FLAGS = ("-std=gnu11", "-O1", "-fPIC", "-shared", "-fsanitize=undefined,float-cast-overflow")
ON_ERROR = "-fsanitize-undefined-trap-on-error"
"""The process ends by a signal there; no library of the compiler's is needed."""


def exercise_pixels(kernels: ctypes.CDLL) -> None:
    """Draw pixels of all sizes that have ends of their own, at every level."""
    random = np.random.default_rng(0)
    for level, planes in itertools.product(range(kernels.paceline_level() + 1), ([], [3])):
        for width in (1, 2, 5, 16, 63, 64, 65, 321, 700):
            image, out = random.integers(0, 256, (3, width, *planes), np.uint8), np.empty((3, width, 3), np.uint8)
            for mirror_x, mirror_y in itertools.product((False, True), repeat=2):
                jitter_by_kernel(kernels, image, (0.3, 9, 9), out, mirror_x=mirror_x, mirror_y=mirror_y, level=level)
            for wanted in (1, 7, 130) if width > 1 else ():
                resample_by_kernel(kernels, image, np.empty((5, wanted, *planes), np.uint8), level)
        large = random.integers(0, 256, (90, 110, *planes), np.uint8)
        rectangles = ((0, 0, 90, 110, 1, 0, 0, 70, 31), (3, 5, 40, 40, 0, 20, 20, 60, 60), (0, 0, 9, 9, 0, 5, 5, 5, 40))
        tiles, hsv, mirrors = np.array([rectangles], np.int64), np.array([[0.1, 1.2, 0.8]]), np.array([[True, True]])
        images = [[large, large[::-1], large]]
        pictures = np.empty((1, 70, 70, 3), np.uint8)
        draw_pictures(kernels, tiles, images, hsv, mirrors, pictures, [True], fill=114, level=level)
    source, gathered = random.integers(0, 256, 40_000, np.uint8), np.empty(40_000, np.uint8)
    for row_bytes, shift in itertools.product((0, 1, 63, 64, 200, 4095, 4097), (0, 1, 63)):
        parts = (source.ctypes.data + 3, row_bytes + 5, row_bytes, 7, gathered.ctypes.data + shift)
        table = np.array([parts, parts], np.int64)
        kernels.paceline_gather(table.ctypes.data, len(table))


def exercise_norm(kernels: ctypes.CDLL) -> None:
    """Normalise maps of many shapes, forward and backward."""
    for dtype, silu, channels, side in itertools.product(
        (torch.float32, torch.bfloat16), (False, True), (1, 3, 64, 66, 700), (2, 9)
    ):
        x = torch.randn(2, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(channels, requires_grad=True), torch.randn(channels, requires_grad=True)
        for pieces in (1, 2) if channels % 2 == 0 else (1,):
            latest = (torch.empty(channels), torch.empty(channels))
            z = normed_and_activated(
                *(x.requires_grad_(), weight, bias, latest, kernels),
                eps=1e-3,
                silu=silu,
                pieces=pieces,
                carried=x.detach() if pieces == 1 else None,
            )
            torch.autograd.grad(z, [x, weight, bias], [torch.randn_like(piece) for piece in z])
            activated_in_place(x.detach().clone(), kernels, pieces=pieces)


def exercise_jpeg(decoder: ctypes.CDLL) -> None:
    """Decode whole, reduced and damaged files."""
    random, level = np.random.default_rng(0), decoder.paceline_level()
    image = cv2.resize(random.integers(0, 256, (9, 11, 3), dtype=np.uint8), (203, 117), interpolation=cv2.INTER_CUBIC)
    for sampling in (0x111111, 0x211111, 0x221111, 0x121111):
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling])[1].tobytes()
        for reduction in (1, 2, 4, 8):
            assert decode_at_level(decoder, encoded, None, level, reduction) is not None
        for _ in range(300):
            damaged = bytearray(encoded)
            damaged[int(random.integers(20, len(encoded)))] = int(random.integers(256))
            decode_at_level(decoder, bytes(damaged), None, int(random.integers(level + 1)), 1)


EXERCISES: dict[str, tuple[Compiled, Callable[[ctypes.CDLL], None]]] = {
    "pixels": (PIXELS, exercise_pixels),
    "norm": (NORM, exercise_norm),
    "jpeg": (JPEG, exercise_jpeg),
}


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("name", list(EXERCISES))
def test_nothing_is_undefined(name: str, compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    library, _ = EXERCISES[name]
    files = [FOLDER / file for file in (library.source, *library.parts)]
    for file in files:
        shutil.copy(file, tmp_path)
    crc = zlib.crc32(b"".join(file.read_bytes() for file in files))
    for built in FOLDER.glob(f"{library.stem}.*"):
        sources = [file.name for file in files if file.suffix == ".c"]
        made = [compiler, *FLAGS, ON_ERROR, f"-DPACELINE_SOURCE_CRC={crc}u", *sources, "-o", built.name, "-lm"]
        subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
    if not list(tmp_path.glob(f"{library.stem}.*")):
        pytest.skip("it was not built")
    ended = subprocess.run([sys.executable, __file__, str(tmp_path), name], check=False)
    assert ended.returncode == 0, "a signal says that it met something undefined"


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted, go_through = EXERCISES[sys.argv[2]]
    go_through(wanted.load(Path(sys.argv[1])))
