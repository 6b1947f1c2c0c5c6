"""Build of the one part that is compiled; everything else is said in pyproject.toml."""

from __future__ import annotations

import zlib
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "src/paceline/native/pixels.c"

# One body for all levels of vector units, and the same bytes from all of them: so no contraction to fused operations.
# Nothing is infinite or NaN there, which the compiler must know to use the units' minimum and maximum.
FLAGS = "-std=gnu11 -O3 -ffp-contract=off -ffinite-math-only -fno-signed-zeros -fno-trapping-math -fno-math-errno"

kernels = Extension(
    "paceline.native._pixels",
    [SOURCE],
    define_macros=[("PACELINE_SOURCE_CRC", f"{zlib.crc32(Path(SOURCE).read_bytes())}u")],
    depends=["setup.py"],
    extra_compile_args=[*FLAGS.split(), "-fvisibility=hidden", "-Wall", "-Wextra"],
    optional=True,  # without a compiler the installation goes on, and OpenCV and numpy do the work
)

setup(ext_modules=[kernels])
