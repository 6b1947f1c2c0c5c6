"""Build of the parts that are compiled; everything else is said in pyproject.toml."""

from __future__ import annotations

import zlib
from pathlib import Path

from setuptools import Extension, setup


def extension(name: str, source: str, flags: str, parts: tuple[str, ...] = ()) -> Extension:
    """Describe one library; it names the CRC-32 of its source and parts, so that an old build is noticed."""
    files = [source, *(str(Path(source).parent / part) for part in parts)]
    return Extension(
        f"paceline.native.{name}",
        [file for file in files if file.endswith(".c")],
        define_macros=[("PACELINE_SOURCE_CRC", f"{zlib.crc32(b''.join(Path(file).read_bytes() for file in files))}u")],
        depends=["setup.py", *files],
        extra_compile_args=["-std=gnu11", *flags.split(), "-fvisibility=hidden", "-Wall", "-Wextra"],
        optional=True,  # without a compiler the installation goes on, and OpenCV, numpy and Python do the work
    )


# One body for all levels of vector units, and the same bytes from all of them: so no contraction to fused operations.
# Nothing is infinite or NaN there, which the compiler must know to use the units' minimum and maximum.
PIXELS = "-O3 -ffp-contract=off -ffinite-math-only -fno-signed-zeros -fno-trapping-math -fno-math-errno"

# Every box is decided as PyTorch decides it.
SUPPRESS = "-O3 -ffp-contract=off -fno-trapping-math"

# Numbers in label files are rounded as Python's float() rounds them: no shortcuts.
SCAN = "-O2 -ffp-contract=off"

# The units' minimum and maximum are to be used, and fused operations; a test asks that NaN goes through all the same.
NORM = "-O3 -ffinite-math-only -fno-signed-zeros -fno-trapping-math -fno-math-errno"

# All of it is arithmetic of integers.
JPEG = "-O3"

setup(
    ext_modules=[
        extension(
            "_pixels",
            "src/paceline/native/pixels.c",
            PIXELS,
            ("levels.h", "jitter.h", "resample.h", "halve.h", "picture.h", "gather.h"),
        ),
        extension("_norm", "src/paceline/native/norm.c", NORM, ("levels.h",)),
        extension("_suppress", "src/paceline/native/suppress.c", SUPPRESS),
        extension("_scan", "src/paceline/native/scan.c", SCAN),
        extension(
            "_jpeg",
            "src/paceline/native/jpeg.c",
            JPEG,
            (
                "jpeg_avx2.c",
                "jpeg.h",
                "jpeg_decode.h",
                "jpeg_entropy.h",
                "jpeg_reduced.h",
                "jpeg_transform.h",
                "jpeg_vectors.h",
            ),
        ),
    ]
)
