"""Headers agree with a real decoder on every kind of file, and see what is no whole image."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paceline.data.decode import decode
from paceline.data.headers import BadImage, read_header

if TYPE_CHECKING:
    from pathlib import Path

_MODES = {
    "jpg": ("L", "RGB", "CMYK"),
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "bmp": ("1", "L", "RGB"),
    "webp": ("RGB", "RGBA"),
    "tif": ("1", "L", "RGB", "I;16"),
}
_FORMATS = {"jpg": "jpeg", "png": "png", "bmp": "bmp", "webp": "webp", "tif": "tiff"}


def _picture(mode: str, height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 256)
    return Image.fromarray(noise).convert(mode)


def _encoded(picture: Image.Image, suffix: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, _FORMATS[suffix], **options)
    return stream.getvalue()


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in _MODES.items() for mode in modes])
def test_size_is_that_of_the_decoder(tmp_path: Path, suffix: str, mode: str) -> None:
    path = tmp_path / f"wrong-suffix.{mode.replace(';', '')}"
    for height, width in ((1, 1), (7, 300), (301, 20)):
        path.write_bytes(_encoded(_picture(mode, height, width), suffix))
        header = read_header(path)
        assert (header.height, header.width, header.orientation) == (height, width, 1)
        assert header.format == _FORMATS[suffix]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_turns_the_size(tmp_path: Path, suffix: str, orientation: int) -> None:
    picture = _picture("RGB", 20, 30)
    exif = Image.Exif()
    exif[274] = orientation
    options = {"tiffinfo": {274: orientation}} if suffix == "tif" else {"exif": exif}
    path = tmp_path / "a"
    path.write_bytes(_encoded(picture, suffix, **options))
    header = read_header(path)
    assert header.orientation == orientation
    assert (header.height, header.width) == ((30, 20) if orientation > 4 else (20, 30))


@pytest.mark.parametrize("options", [{"progressive": True}, {"optimize": True}, {"icc_profile": b"x" * 200_000}])
def test_jpeg_variants_with_long_headers(tmp_path: Path, options: dict[str, object]) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(_encoded(_picture("RGB", 50, 70), "jpg", **options))
    assert (read_header(path).height, read_header(path).width) == (50, 70)


def test_lossless_webp_and_compressed_tiff(tmp_path: Path) -> None:
    for suffix, options in (("webp", {"lossless": True}), ("tif", {"compression": "tiff_lzw"})):
        (tmp_path / "a").write_bytes(_encoded(_picture("RGB", 33, 65), suffix, **options))
        assert (read_header(tmp_path / "a").height, read_header(tmp_path / "a").width) == (33, 65)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_bytes_behind_the_end_do_no_harm(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(_encoded(_picture("RGB", 50, 70), suffix) + b"\0" * 100_000)
    assert read_header(path).width == 70


@pytest.mark.parametrize("suffix", sorted(_FORMATS))
@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 0.97))
def test_cut_off_files_are_seen(tmp_path_factory: pytest.TempPathFactory, suffix: str, share: float) -> None:
    content = _encoded(_picture("RGB", 64, 64), suffix)
    path = tmp_path_factory.getbasetemp() / f"cut.{suffix}"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadImage):
        read_header(path)


def test_cut_behind_a_long_header_is_a_cut(tmp_path: Path) -> None:
    """Also within the beginning of the scan, whose length then leads out of the file."""
    content = _encoded(_picture("RGB", 50, 70), "jpg", icc_profile=b"x" * 9000)
    scan = content.rindex(b"\xff\xda")
    for length in range(scan + 4, scan + 14):
        (tmp_path / "a.jpg").write_bytes(content[:length])
        with pytest.raises(BadImage, match="is cut off"):
            read_header(tmp_path / "a.jpg")


@settings(max_examples=150, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(sorted(_FORMATS)))
def test_damaged_bytes_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    content = bytearray(_encoded(_picture("RGB", 16, 16), suffix))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except BadImage:
        return
    assert header.height >= 1
    assert header.width >= 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\xef\xbb\xbf\n <html>", "web page"),
        (b"GIF89a", "GIF"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0" * 500, "zeros"),
        (b"some text", "no JPEG"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BadImage, match=words):
        read_header(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("mode", "words"), [("F", "32-bit floating-point samples; convert it to 8 bits"), ("I", "32-bit samples")]
)
def test_tiff_that_no_decoder_reads_is_named(tmp_path: Path, mode: str, words: str) -> None:
    """What the header lets pass is decoded, and what it refuses is not."""
    path = tmp_path / "a.tif"
    path.write_bytes(_encoded(_picture("L", 20, 30).convert(mode), "tif"))
    with pytest.raises(BadImage, match=words):
        read_header(path)
    with pytest.raises(BadImage):
        decode(path)
    for readable in _MODES["tif"]:
        path.write_bytes(_encoded(_picture(readable, 20, 30), "tif"))
        assert (read_header(path).height, read_header(path).width) == decode(path).shape[:2]


def test_missing_file_and_folder_are_bad(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(BadImage, match="cannot be"):
            read_header(path)
