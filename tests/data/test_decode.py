from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from paceline.data import decode as decoders
from paceline.data.decode import decode, decode_compact, reductions
from paceline.data.headers import BadImage

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def picture(height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
def test_every_format_gives_rgb(kind: str, mode: str) -> None:
    image = Image.fromarray(picture()).convert(mode)
    if (kind == "JPEG" and mode in ("1", "P", "RGBA", "LA")) or (kind == "BMP" and mode in ("LA", "RGBA")):
        pytest.skip("the format has no such images")
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    encoded = encode(image, kind, **options)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
    found = decode(encoded)
    assert found.shape == (48, 64, 3)
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 2
    compact = decode_compact(encoded)
    assert compact.shape[:2] == (48, 64)
    if kind in ("JPEG", "PNG") and mode in ("1", "L"):
        assert compact.ndim == 2
    if compact.ndim == 2:
        np.testing.assert_array_equal(np.repeat(compact[..., None], 3, axis=2), found)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bits_are_scaled_to_8(suffix: str) -> None:
    pixels = picture()
    encoded = cv2.imencode(suffix, pixels[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    np.testing.assert_array_equal(decode(encoded), pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("reduction", [1, 2])
def test_exif_orientation_is_applied_once(kind: str, orientation: int, reduction: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options: dict[str, Any] = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif}
    if kind == "WEBP":
        options["lossless"] = True
    if kind == "JPEG":
        options["quality"] = 95
    encoded = encode(Image.fromarray(picture(50, 67)), kind, **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))
    found = decode(encoded, orientation, reduction)
    height, width = upright.shape[:2]
    assert found.shape == (-(-height // reduction), -(-width // reduction), 3)
    padded = np.pad(upright, ((0, height % reduction), (0, width % reduction), (0, 0)), mode="edge").astype(float)
    blocks = padded.reshape(found.shape[0], reduction, found.shape[1], reduction, 3).mean(axis=(1, 3))
    assert np.abs(found - blocks).mean() < 2.5


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("shape", [(160, 240), (163, 241), (167, 255), (9, 200)])
def test_reduced_pixels_are_means_of_their_blocks(kind: str, reduction: int, shape: tuple[int, int]) -> None:
    """So that a place x of the source is x / reduction, at the far end of sizes that do not divide too."""
    pixels = picture(*shape)
    encoded = encode(Image.fromarray(pixels), kind, **({"quality": 98, "subsampling": 0} if kind == "JPEG" else {}))
    found = decode(encoded, 1, reduction)
    height, width = -(-shape[0] // reduction), -(-shape[1] // reduction)
    assert found.shape == (height, width, 3)
    fill = ((0, height * reduction - shape[0]), (0, width * reduction - shape[1]), (0, 0))
    padded = np.pad(pixels, fill, mode="edge").astype(float)
    blocks = padded.reshape(height, reduction, width, reduction, 3).mean(axis=(1, 3))
    assert np.abs(found - blocks).mean() < 2


def test_reductions_keep_the_long_side() -> None:
    sizes = np.array([[480, 640], [1280, 720], [1279, 100], [3000, 4000], [6000, 8001], [20000, 4]])
    assert reductions(sizes, 640).tolist() == [1, 2, 1, 4, 8, 8]
    assert reductions(sizes, 640, dividing=True).tolist() == [1, 2, 1, 4, 1, 4]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6])
def test_cut_off_files_are_bad(kind: str, share: float, capfd: pytest.CaptureFixture[str]) -> None:
    encoded = encode(Image.fromarray(picture(200, 200)), kind)
    with pytest.raises(BadImage):
        decode(encoded[: int(len(encoded) * share)])


def test_missing_and_foreign_files_are_bad(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="cannot be read"):
        decode(tmp_path / "none.jpg")
    with pytest.raises(BadImage, match="cannot be decoded"):
        decode(b"<html><body>not found</body></html>")


def test_paths_and_bytes_are_the_same(tmp_path: Path) -> None:
    encoded = encode(Image.fromarray(picture()), "PNG")
    (tmp_path / "Ünïcode name.png").write_bytes(encoded)
    np.testing.assert_array_equal(decode(tmp_path / "Ünïcode name.png"), decode(encoded))


def by_opencv(encoded: bytes, reduction: int, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.uint8] | None:
    """Pixels that OpenCV alone would give; None where it calls the file bad."""
    with monkeypatch.context() as patched:
        patched.setattr(decoders, "_decode_jpeg", lambda *_: None)
        try:
            return decode_compact(encoded, 1, reduction)
        except BadImage:
            return None


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(48, 64), (163, 241), (9, 200), (8, 5), (2, 2), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 20}]
)
def test_both_jpeg_decoders_give_the_same_bytes(
    options: dict[str, Any], mode: str, shape: tuple[int, int], reduction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encode(Image.fromarray(picture(*shape)).convert(mode), "JPEG", **options)
    expected = by_opencv(encoded, reduction, monkeypatch)
    assert expected is not None
    np.testing.assert_array_equal(decode_compact(encoded, 1, reduction), expected)


def test_only_colour_spaces_that_both_know_go_to_the_fast_decoder() -> None:
    for mode, known in (("RGB", True), ("L", True), ("CMYK", False)):
        encoded = encode(Image.fromarray(picture()).convert(mode), "JPEG")
        assert (decoders._decode_jpeg(encoded, 1) is not None) == known


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
def test_our_own_decoder_changes_no_pixel(
    options: dict[str, Any], mode: str, orientation: int, reduction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encode(Image.fromarray(picture(51, 67)).convert(mode), "JPEG", **options)
    found = decode_compact(encoded, orientation, reduction)
    monkeypatch.setattr(decoders, "decode_jpeg", lambda *_: None)
    expected = decode_compact(encoded, orientation, reduction)
    np.testing.assert_array_equal(found, expected)


def test_damaged_jpeg_is_judged_by_opencv(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Bytes changed or left out anywhere: the same pixels or the same refusal as without the fast decoder."""
    rng = np.random.default_rng(0)
    whole = encode(Image.fromarray(picture(120, 160)), "JPEG")
    num_refused_by_fast = 0
    for _ in range(150):
        damaged = bytearray(whole)
        place = int(rng.integers(2, len(whole) - 2))
        if rng.random() < 0.5:
            damaged[place] ^= int(rng.integers(1, 256))
        else:
            del damaged[place : min(place + int(rng.integers(1, 200)), len(whole) - 2)]
        num_refused_by_fast += decoders._decode_jpeg(bytes(damaged), 1) is None
        expected = by_opencv(bytes(damaged), 1, monkeypatch)
        if expected is None:
            with pytest.raises(BadImage):
                decode_compact(bytes(damaged))
        else:
            np.testing.assert_array_equal(decode_compact(bytes(damaged)), expected)
    assert num_refused_by_fast > 10
