"""The compiled decoder of JPEG gives the pixels of simplejpeg to the last bit, or refuses the file."""

from __future__ import annotations

import io
import itertools
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from paceline.native.jpeg import decode_at_level, decode_jpeg, decoder, load_jpeg

if TYPE_CHECKING:
    import ctypes
    from pathlib import Path

Pixels = NDArray[np.uint8]
SAMPLINGS = {"444": 0x111111, "422": 0x211111, "420": 0x221111, "440": 0x121111}
REDUCTIONS = (2, 4, 8)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = decoder()
    if found is None:
        pytest.skip("the decoder was not built")
    return found


def picture(height: int, width: int, noise: int = 30, seed: int = 0) -> Pixels:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    smooth = cv2.resize(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.integers(-noise, noise + 1, (height, width, 3)), 0, 255).astype(np.uint8)


def encode(pixels: Pixels, sampling: str = "444", quality: int = 90, **options: int) -> bytes:
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality]
    if pixels.ndim == 3:
        flags += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling]]
    for name, value in options.items():
        flags += [getattr(cv2, f"IMWRITE_JPEG_{name.upper()}"), value]
    return cv2.imencode(".jpg", pixels, flags)[1].tobytes()


def by_pillow(pixels: Pixels, mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


def by_simplejpeg(encoded: bytes, reduction: int = 1) -> Pixels | None:
    """Pixels as the reference gives them; None where it refuses or warns."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        least = (-(-height // reduction), -(-width // reduction)) if reduction > 1 else (0, 0)
        pixels: Pixels = simplejpeg.decode_jpeg(
            encoded, "GRAY" if colours == "Gray" else "RGB", min_height=least[0], min_width=least[1]
        )
    except ValueError:
        return None
    return pixels[..., 0] if colours == "Gray" else pixels


def decode_by_all(library: ctypes.CDLL, encoded: bytes, reduction: int = 1) -> Pixels | None:
    """Pixels, which are those of all levels of this machine; None where the file is refused."""
    levels = range(library.paceline_level() + 1)
    found = [decode_at_level(library, encoded, None, level, reduction) for level in levels]
    for other in found[1:]:
        assert (other is None) == (found[0] is None)
        np.testing.assert_array_equal(other, found[0])
    return found[-1]


def check(library: ctypes.CDLL, encoded: bytes, reduction: int = 1) -> None:
    """The file is taken, and its pixels are those of the reference."""
    found = decode_by_all(library, encoded, reduction)
    assert found is not None
    np.testing.assert_array_equal(found, by_simplejpeg(encoded, reduction))


def check_reduced(library: ctypes.CDLL, encoded: bytes) -> None:
    for reduction in REDUCTIONS:
        check(library, encoded, reduction)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_all_small_sizes(library: ctypes.CDLL, sampling: str) -> None:
    pixels = picture(40, 40)
    for height, width in itertools.product(range(1, 41), repeat=2):
        check(library, encode(np.ascontiguousarray(pixels[:height, :width]), sampling))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("shape", [(1, 1500), (1500, 1), (331, 517), (512, 640), (513, 1025)])
def test_large_sizes(library: ctypes.CDLL, sampling: str, shape: tuple[int, int]) -> None:
    check(library, encode(picture(*shape), sampling))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("noise", [0, 30, 200])
def test_all_qualities(library: ctypes.CDLL, sampling: str, noise: int) -> None:
    pixels = picture(40, 56, noise)
    for quality in range(1, 101):
        check(library, encode(pixels, sampling, quality))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("optimize", [0, 1])
@pytest.mark.parametrize("interval", [1, 2, 5, 7, 60, 1000])
def test_restarts_and_codes_of_the_image(library: ctypes.CDLL, sampling: str, optimize: int, interval: int) -> None:
    for quality in (30, 95):
        check(library, encode(picture(97, 130), sampling, quality, optimize=optimize, rst_interval=interval))


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (64, 64), (121, 203)])
def test_grey(library: ctypes.CDLL, shape: tuple[int, int]) -> None:
    for quality in (1, 50, 95, 100):
        encoded = encode(np.ascontiguousarray(picture(*shape)[..., 0]), quality=quality)
        check(library, encoded)
        found = decode_by_all(library, encoded)
        assert found is not None
        assert found.shape == shape


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    noise=st.integers(0, 128),
    sampling=st.sampled_from(sorted(SAMPLINGS)),
    quality=st.integers(1, 100),
    interval=st.integers(0, 9),
    optimize=st.integers(0, 1),
    seed=st.integers(0, 10),
)
@settings(max_examples=200, deadline=None)
def test_any_picture(
    height: int, width: int, noise: int, sampling: str, quality: int, interval: int, optimize: int, seed: int
) -> None:
    library = decoder()
    if library is None:
        pytest.skip("the decoder was not built")
    pixels = picture(height, width, noise, seed)
    check(library, encode(pixels, sampling, quality, rst_interval=interval, optimize=optimize))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_all_small_sizes_reduced(library: ctypes.CDLL, sampling: str) -> None:
    """Those up to 8 x 8 are left to others: simplejpeg has several reductions of one size there."""
    pixels = picture(70, 70)
    for height, width in itertools.product((*range(1, 20), 31, 32, 33, 34, 63, 64, 65, 70), repeat=2):
        encoded = encode(np.ascontiguousarray(pixels[:height, :width]), sampling)
        if max(height, width) > 8:
            check_reduced(library, encoded)
        else:
            assert all(decode_by_all(library, encoded, reduction) is None for reduction in REDUCTIONS)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("shape", [(1, 1500), (1500, 1), (331, 517), (512, 640), (1080, 1920)])
def test_large_sizes_reduced(library: ctypes.CDLL, sampling: str, shape: tuple[int, int]) -> None:
    check_reduced(library, encode(picture(*shape), sampling))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("noise", [0, 30, 200])
def test_all_qualities_reduced(library: ctypes.CDLL, sampling: str, noise: int) -> None:
    pixels = picture(40, 56, noise)
    for quality in range(1, 101):
        check_reduced(library, encode(pixels, sampling, quality, optimize=quality % 2, rst_interval=quality % 5))


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (64, 64), (121, 203)])
def test_grey_reduced(library: ctypes.CDLL, shape: tuple[int, int]) -> None:
    for quality in (1, 50, 95, 100):
        for interval in (0, 2):
            pixels = np.ascontiguousarray(picture(*shape)[..., 0])
            check_reduced(library, encode(pixels, quality=quality, rst_interval=interval))


@pytest.mark.parametrize("reduction", [-1, 0, 3, 16])
def test_other_reductions_are_refused(library: ctypes.CDLL, reduction: int) -> None:
    assert decode_by_all(library, encode(picture(64, 64)), reduction) is None


def segments(encoded: bytes) -> list[tuple[int, int, int]]:
    """Marker, begin and end of the content of each segment up to the scan's header."""
    found, at = [], 2
    while not found or found[-1][0] != 0xDA:
        length = int.from_bytes(encoded[at + 2 : at + 4], "big")
        found.append((encoded[at + 1], at + 4, at + 2 + length))
        at += 2 + length
    return found


def with_steps(encoded: bytes, steps: list[int]) -> bytes:
    """The file with other steps of quantisation, so that its coefficients are larger than those of any image."""
    changed = bytearray(encoded)
    for marker, begin, _ in segments(encoded):
        if marker == 0xDB:
            changed[begin + 1 : begin + 65] = bytes(steps)
    return bytes(changed)


@pytest.mark.parametrize("reduction", [1, *REDUCTIONS])
@pytest.mark.parametrize("sampling", ["444", "420"])
def test_extreme_coefficients_are_equal_or_refused(library: ctypes.CDLL, sampling: str, reduction: int) -> None:
    """16-bit sums of the reference's vector code may wrap round there."""
    rng = np.random.default_rng(0)
    num_taken = num_refused = 0
    for number in range(300):
        black_and_white = (rng.integers(0, 2, (24, 24, 3)) * 255).astype(np.uint8)
        pixels = black_and_white if number % 2 else picture(24, 24, 128, number)
        encoded = encode(pixels, sampling, int(rng.integers(80, 101)))
        most = 2 ** int(rng.integers(0, 8))
        changed = with_steps(encoded, rng.integers(1, most + 1, 64).tolist())
        found = decode_by_all(library, changed, reduction)
        num_refused += found is None
        num_taken += found is not None
        if found is not None:
            np.testing.assert_array_equal(found, by_simplejpeg(changed, reduction))
    assert num_taken > 50
    assert num_refused > (5 if reduction == 8 and sampling == "444" else 50)  # DC alone seldom leaves its range


@pytest.mark.parametrize("reduction", [1, *REDUCTIONS])
def test_one_coefficient_of_any_size(library: ctypes.CDLL, reduction: int) -> None:
    """Each alone at a step of 255, so that results leave the range on both sides by far."""
    rng = np.random.default_rng(1)
    num_taken = 0
    for place in range(64):
        values = np.zeros((8, 8), np.float32)
        values[place // 8, place % 8] = rng.choice([-1, 1]) * rng.integers(200, 900)
        block = np.clip(cv2.idct(values) + 128, 0, 255).astype(np.uint8)
        encoded = encode(np.tile(block, (2, 3)), quality=100)
        for step in (1, 3, 5, 8, 30, 255):
            changed = with_steps(encoded, [step] * 64)
            found = decode_by_all(library, changed, reduction)
            if found is not None:
                num_taken += 1
                np.testing.assert_array_equal(found, by_simplejpeg(changed, reduction))
    assert num_taken > 100


def restarted(number: int) -> bytes:
    """A file whose second restart has this number."""
    changed = bytearray(encode(picture(32, 32), rst_interval=2))
    changed[changed.index(b"\xff\xd1", segments(bytes(changed))[-1][2]) + 1] = 0xD0 + number
    return bytes(changed)


def unusual_files() -> dict[str, bytes]:
    pixels = picture(48, 64)
    plain = by_pillow(pixels, quality=90)
    found = {marker: (begin, end) for marker, begin, end in segments(plain)}
    scan = found[0xDA][1]

    def without(marker: int) -> bytes:
        begin, end = found[marker]
        return plain[: begin - 4] + plain[end:]

    def changed(place: int, value: int) -> bytes:
        return plain[:place] + bytes([value]) + plain[place + 1 :]

    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
    frame = found[0xC0][0]
    return {
        "progressive": by_pillow(pixels, progressive=True),
        "CMYK": by_pillow(pixels, "CMYK"),
        "RGB by Adobe's marker": without(0xE0)[:2] + adobe + b"\x00" + without(0xE0)[2:],
        "YCCK by Adobe's marker": plain[:2] + adobe + b"\x02" + plain[2:],
        "RGB by identifiers": by_pillow(pixels, keep_rgb=True),
        "another version of JFIF": changed(found[0xE0][0] + 5, 2),
        "no tables of quantisation": without(0xDB),
        "no codes": without(0xC4),
        "no frame": without(0xC0),
        "12 bits": changed(frame, 12),
        "no height": plain[: frame + 1] + b"\0\0" + plain[frame + 3 :],
        "four components": changed(frame + 5, 4),
        "odd sampling": changed(frame + 7, 0x41),
        "chroma of two blocks": changed(frame + 10, 0x21),
        "arithmetic": changed(frame - 3, 0xC9),
        "spectral selection": changed(scan - 2, 62),
        "successive approximation": changed(scan - 1, 1),
        "cut off": plain[: scan + (len(plain) - scan) // 2],
        "cut off with an end": plain[: scan + (len(plain) - scan) // 2] + b"\xff\xd9",
        "without an end": plain[:-2],
        "bytes before the end": plain[:-2] + b"\x12\x34\x56\xff\xd9",
        "a restart before the end": plain[:-2] + b"\xff\xd0\xff\xd9",
        "no restarts although they were announced": encode(pixels, rst_interval=5).replace(b"\xff\xd0", b""),
        "a restart too many": restarted(2),
        "a restart left out": restarted(0),
        "bytes between segments": plain[:20] + b"\x00" + plain[20:],
        "two frames": plain[: frame - 4] + plain[frame - 4 : found[0xC0][1]] + plain[frame - 4 :],
        "nothing": b"",
        "a beginning": b"\xff\xd8",
        "no JPEG": b"\x89PNG\r\n\x1a\n" + bytes(100),
    }


@pytest.mark.parametrize("name", unusual_files())
def test_unusual_files_are_refused(library: ctypes.CDLL, name: str) -> None:
    assert decode_by_all(library, by_pillow(picture(48, 64), quality=90)) is not None
    for reduction in (1, *REDUCTIONS):
        assert decode_by_all(library, unusual_files()[name], reduction) is None


def test_more_after_the_end_is_no_matter(library: ctypes.CDLL) -> None:
    """As phones write it."""
    encoded = encode(picture(50, 60), "420")
    check(library, encoded + b"more" * 100)
    check(library, encoded + encoded)


@pytest.mark.parametrize("reduction", [1, *REDUCTIONS])
@pytest.mark.parametrize("is_grey", [False, True])
def test_nothing_is_written_behind_the_room(library: ctypes.CDLL, is_grey: bool, reduction: int) -> None:
    pixels = picture(37, 53)
    encoded = encode(np.ascontiguousarray(pixels[..., 0]) if is_grey else pixels, "420")
    expected = by_simplejpeg(encoded, reduction)
    assert expected is not None
    for level in range(library.paceline_level() + 1):
        out = np.full(expected.size + 100, 7, np.uint8)
        found = decode_at_level(library, encoded, out[: expected.size], level, reduction)
        assert found is not None
        assert found.ctypes.data == out.ctypes.data
        np.testing.assert_array_equal(found, expected)
        assert (out[expected.size :] == 7).all()
        out[:] = 7
        assert decode_at_level(library, encoded, out[: expected.size - 1], level, reduction) is None
        assert (out == 7).all()


def test_a_header_that_promises_too_much_takes_no_memory(library: ctypes.CDLL) -> None:
    encoded = bytearray(encode(picture(16, 16)))
    frame = next(begin for marker, begin, _ in segments(bytes(encoded)) if marker == 0xC0)
    encoded[frame + 1 : frame + 5] = b"\xff\xdc\xff\xdc"
    out = np.empty(1000, np.uint8)
    for level in range(library.paceline_level() + 1):
        assert decode_at_level(library, bytes(encoded), out, level) is None


def damaged(rng: random.Random, files: list[bytes]) -> bytes:
    """One of the files with bytes changed, left out, or taken from another."""
    changed, other = bytearray(rng.choice(files)), rng.choice(files)
    place, length = rng.randrange(len(changed)), rng.randrange(1, 60)
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == 1:
        return bytes(changed[:place]) + b"\xff\xd9"
    elif kind == 2:
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == 3:
        begin = rng.randrange(len(other))
        changed[place : place + length] = other[begin : begin + length]
    else:
        del changed[place : place + length]
    return bytes(changed)


def test_damaged_files_are_refused_or_have_the_same_pixels(library: ctypes.CDLL) -> None:
    """Whatever simplejpeg refuses or warns of is refused, too."""
    rng = random.Random(0)
    files = [
        encode(picture(height, width, 60), sampling, quality, rst_interval=interval, optimize=interval % 2)
        for height, width in ((8, 8), (17, 23), (33, 40))
        for sampling in SAMPLINGS
        for quality, interval in ((10, 0), (90, 1), (100, 3))
    ]
    files += [encode(picture(20, 30)[..., 0].copy()), by_pillow(picture(20, 30), progressive=True)]
    num_taken = 0
    for _ in range(4000):
        changed = damaged(rng, files)
        found = decode_by_all(library, changed)
        if found is not None:
            num_taken += 1
            np.testing.assert_array_equal(found, by_simplejpeg(changed))
    assert 400 < num_taken < 2000


def test_damaged_files_reduced_are_refused_or_have_the_same_pixels(library: ctypes.CDLL) -> None:
    rng = random.Random(1)
    files = [
        encode(picture(height, width, 60), sampling, quality, rst_interval=interval, optimize=interval % 2)
        for height, width in ((9, 8), (17, 23), (33, 40))
        for sampling in SAMPLINGS
        for quality, interval in ((10, 0), (90, 1), (100, 3))
    ]
    files += [encode(picture(20, 30)[..., 0].copy(), rst_interval=interval) for interval in (0, 2)]
    num_taken = 0
    for _ in range(4000):
        changed, reduction = damaged(rng, files), rng.choice(REDUCTIONS)
        found = decode_by_all(library, changed, reduction)
        if found is not None:
            num_taken += 1
            np.testing.assert_array_equal(found, by_simplejpeg(changed, reduction))
    assert 400 < num_taken < 2000


def test_many_threads_decode_as_one(library: ctypes.CDLL) -> None:
    files = [encode(picture(90 + number, 120, seed=number), "420" if number % 2 else "444") for number in range(16)]
    expected = [by_simplejpeg(file) for file in files]
    wrong: list[int] = []

    def work(first: int) -> None:
        for turn in range(40):
            number = (first + turn) % len(files)
            found = decode_at_level(library, files[number], None, library.paceline_level())
            if found is None or not np.array_equal(found, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_is_used_where_it_is_quicker(library: ctypes.CDLL) -> None:
    encoded = encode(picture(30, 40))
    found = decode_jpeg(encoded)
    assert (found is not None) == (library.paceline_level() > 0)


MANY = 10**6


@pytest.mark.parametrize("reduction", [1, 2, 8])
@pytest.mark.parametrize("pixels", [picture(33, 50), picture(40, 21)[..., 0]], ids=["colour", "grey"])
def test_a_file_is_read_and_decoded_at_once(
    library: ctypes.CDLL, tmp_path: Path, pixels: Pixels, reduction: int
) -> None:
    file = tmp_path / "a ü.jpg"
    file.write_bytes(encode(pixels))
    expected = decode_jpeg(file.read_bytes(), reduction)
    assert expected is not None
    height, width = expected.shape[:2]
    for most_pixels in (height * width, MANY):
        found = load_jpeg(str(file), most_pixels, reduction)
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, expected)
    assert found.base is None or found.base.nbytes < 4 * found.nbytes or pixels.ndim == 3, "memory for colours is kept"


@pytest.mark.parametrize("change", ["progressive", "cut off", "of other kind", "too large", "tiny", "empty"])
def test_of_a_file_that_is_refused_the_bytes_are_given(library: ctypes.CDLL, tmp_path: Path, change: str) -> None:
    content, most_pixels = encode(picture(32, 48)), 32 * 48
    if change == "progressive":
        content = encode(picture(32, 48), progressive=1)
    if change == "cut off":
        content = content[:-2].replace(b"\xff\xd9", b"")
    if change == "of other kind":
        content = cv2.imencode(".png", picture(32, 48))[1].tobytes()
    if change == "too large":
        most_pixels -= 1
    if change in ("tiny", "empty"):
        content = content[: {"tiny": 1, "empty": 0}[change]]
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    assert load_jpeg(str(file), most_pixels) == content


def test_what_cannot_be_read_at_once_is_left_alone(library: ctypes.CDLL, tmp_path: Path) -> None:
    assert load_jpeg(str(tmp_path / "gone.jpg"), MANY) is None
    assert load_jpeg(str(tmp_path), MANY) is None
    os.mkfifo(tmp_path / "pipe.jpg")
    writer = os.open(tmp_path / "pipe.jpg", os.O_RDWR)  # so that to open it waits for nobody
    assert load_jpeg(str(tmp_path / "pipe.jpg"), MANY) is None
    os.close(writer)
    large = tmp_path / "large.jpg"
    large.write_bytes(encode(picture(32, 48)) + bytes(3 << 20))
    assert load_jpeg(str(large), MANY) is None


def test_threads_have_memory_of_their_own(library: ctypes.CDLL, tmp_path: Path) -> None:
    files, expected = [], []
    for seed in range(4):
        files.append(str(tmp_path / f"{seed}.jpg"))
        content = encode(picture(64 + seed, 80, seed=seed))
        (tmp_path / f"{seed}.jpg").write_bytes(content)
        expected.append(decode_jpeg(content))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            found = list(pool.map(lambda file: load_jpeg(file, MANY), files))
            assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))  # type: ignore[arg-type]
