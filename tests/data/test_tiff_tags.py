"""TIFF files give the colours that they store, or are refused by name: never others."""

from __future__ import annotations

import itertools
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.data.decode import decode
from paceline.data.headers import UNDECODABLE, BadImage, read_header

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_DEFLATE = 8


def _tiff(
    pixels: NDArray[np.int64],
    *,
    photometric: int,
    extra: int | None = None,
    bits: int = 8,
    planar: int = 1,
    compression: int = 1,
    tile: tuple[int, int] | None = None,
    order: str = "<",
) -> bytes:
    """Write pixels HWC, 0 to 255, in one strip per plane or in tiles of (height, width)."""
    height, width, samples = pixels.shape
    stored = (pixels * (257 if bits == 16 else 1)).astype(f"{order}u{bits // 8}")
    step = tile or (height, width)
    parts = []
    for plane in [stored] if planar == 1 else np.split(stored, samples, axis=2):
        for top, left in itertools.product(range(0, height, step[0]), range(0, width, step[1])):
            part = plane[top : top + step[0], left : left + step[1]]
            rest = ((0, step[0] - part.shape[0]), (0, step[1] - part.shape[1]), (0, 0))
            content = np.pad(part, rest).tobytes()
            parts.append(zlib.compress(content) if compression == _DEFLATE else content)
    starts = np.cumsum([8, *(len(part) for part in parts)]).tolist()
    places, lengths = starts[:-1], [len(part) for part in parts]
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * samples),
        259: ("H", [compression]),
        262: ("H", [photometric]),
        277: ("H", [samples]),
        284: ("H", [planar]),
    }
    if tile:
        tags |= {322: ("I", [tile[1]]), 323: ("I", [tile[0]]), 324: ("I", places), 325: ("I", lengths)}
    else:
        tags |= {273: ("I", places), 278: ("I", [height]), 279: ("I", lengths)}
    if extra is not None:
        tags[338] = "H", [extra]
    body, fields = b"".join(parts), b""
    for tag, (code, values) in sorted(tags.items()):
        raw = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(raw) > 4:
            raw, body = struct.pack(f"{order}I", 8 + len(body)), body + raw
        fields += struct.pack(f"{order}HHI", tag, 3 if code == "H" else 4, len(values)) + raw.ljust(4, b"\0")
    start = b"II*\0" if order == "<" else b"MM\0*"
    return (
        start + struct.pack(f"{order}I", 8 + len(body)) + body + struct.pack(f"{order}H", len(tags)) + fields + bytes(4)
    )


def _colours(pixels: NDArray[np.int64], photometric: int) -> NDArray[np.int64]:
    """Return what a user sees in them: RGB, alpha dropped."""
    if photometric == 2:
        return pixels[..., :3]
    grey = np.repeat(pixels[..., :1], 3, axis=2)
    return 255 - grey if photometric == 0 else grey


def _why_refused(path: Path) -> str:
    try:
        read_header(path)
    except BadImage as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("photometric", "samples", "extra"),
    [(2, 3, None), (2, 4, 0), (2, 4, 1), (2, 4, 2), (1, 1, None), (0, 1, None), (1, 2, 2), (1, 2, 0)],
)
@pytest.mark.parametrize("tile", [None, (16, 16), (16, 32), (32, 32), (48, 48)])
def test_what_the_scan_lets_pass_has_the_stored_colours(
    tmp_path: Path, photometric: int, samples: int, extra: int | None, tile: tuple[int, int] | None
) -> None:
    path, refused, wrong, right = tmp_path / "a.tif", 0, list[str](), 0
    draws = np.random.default_rng(samples)
    for (height, width), bits, planar, compression, order in itertools.product(
        ((40, 50), (64, 32), (16, 16)), (8, 16), (1, 2), (1, _DEFLATE), "<>"
    ):
        pixels = draws.integers(0, 256, (height, width, samples))
        if planar == 2 and samples == 1:
            continue
        path.write_bytes(
            _tiff(
                pixels,
                photometric=photometric,
                extra=extra,
                bits=bits,
                planar=planar,
                compression=compression,
                tile=tile,
                order=order,
            )
        )
        reason = _why_refused(path)
        if reason:
            assert reason.startswith(f"{UNDECODABLE}: a TIFF of ")
            refused += 1
            continue
        same = np.array_equal(decode(path), _colours(pixels, photometric))
        right += same
        if not same:
            wrong.append(f"{height} x {width}, {bits} bits, planar {planar}, compression {compression}, {order}")
    assert not wrong
    assert right >= 8
    assert not refused or tile


def test_alpha_of_nought_leaves_the_colour(tmp_path: Path) -> None:
    """Of a file whose colours are not multiplied yet, whatever the place of alpha's tag among the others."""
    pixels = np.full((17, 24, 4), 200)
    pixels[..., 3] = 0
    (tmp_path / "a.tif").write_bytes(_tiff(pixels, photometric=2, extra=2))
    assert (decode(tmp_path / "a.tif") == 200).all()


@pytest.mark.parametrize(
    ("samples", "tile", "compression", "words"),
    [
        (3, (16, 16), 1, "tiles of 16 x 16 px without a compression; convert it to 8 bits, grey or RGB, in strips"),
        (2, (32, 32), _DEFLATE, "grey and alpha in tiles of 32 x 32 px that reach over its edge; convert"),
    ],
)
def test_tiles_that_come_out_wrong_are_named(
    tmp_path: Path, samples: int, tile: tuple[int, int], compression: int, words: str
) -> None:
    pixels = np.zeros((40, 50, samples), np.int64)
    photometric = 2 if samples == 3 else 1
    path = tmp_path / "a.tif"
    path.write_bytes(_tiff(pixels, photometric=photometric, tile=tile, compression=compression))
    with pytest.raises(BadImage, match=words):
        read_header(path)
