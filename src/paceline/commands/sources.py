"""Sources: the images that a user points at, as files, folders, patterns, lists or arrays."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import cv2
import numpy as np

from paceline.addresses import shown
from paceline.data.decode import decode
from paceline.data.headers import IMAGE_SUFFIXES, read_header
from paceline.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Source: TypeAlias = "str | Path | NDArray[np.uint8] | PilImage | Sequence[Source]"

_VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".gif"})


class PilImage(Protocol):
    """A picture of PIL, which is no dependency of ours."""

    @property
    def mode(self) -> str:
        """Kind of its pixels."""

    def convert(self, mode: str) -> Any:
        """Give it with pixels of another kind; an array can be made of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSource:
    """One image that can be loaded."""

    path: str
    """Its file, or `image0`, `image1`, ... for an array."""
    array: NDArray[np.uint8] | None = None

    def load(self) -> NDArray[np.uint8]:
        """Return the pixels, upright: HW3, BGR. Raises BadImage for a file that is no whole image."""
        if self.array is not None:
            return self.array
        header = read_header(self.path)
        pixels: NDArray[np.uint8] = cv2.cvtColor(decode(self.path, header.orientation), cv2.COLOR_RGB2BGR)
        return pixels


def find_images(source: Source) -> list[ImageSource]:
    """List the images that `source` means, folders and patterns in the order of their names.

    Arrays are uint8, HW3 in the order blue, green, red, or HW; pictures of PIL are taken as they are, without a look at
    the orientation in their EXIF data. Raises UserError where there is no image, or where
    `source` is of a kind that is not read.
    """
    if isinstance(source, str | Path):
        return [ImageSource(path=path) for path in _find_files(str(source))]
    if isinstance(source, np.ndarray):
        return [ImageSource(path="image0", array=_colour_array(source))]
    if hasattr(source, "convert") and hasattr(source, "mode"):
        rgb: NDArray[np.uint8] = np.asarray(source.convert("RGB"))
        return [ImageSource(path="image0", array=_colour_array(np.ascontiguousarray(rgb[..., ::-1])))]
    if isinstance(source, int):
        raise _no_camera(source)
    if not isinstance(source, Sequence):
        raise UserError(
            f"Images of type {type(source).__name__} are not read; pass a path, a picture of PIL, or a uint8 array HW3 "
            "in the order blue, green, red."
        )
    images: list[ImageSource] = []
    for entry in source:
        for image in find_images(entry):
            named = image if image.array is None else ImageSource(path=f"image{len(images)}", array=image.array)
            images.append(named)
    if not images:
        raise UserError("There is no image to look at; name a file, a folder or a pattern such as 'street/*.jpg'.")
    return images


def _colour_array(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Give an array its three colours; an alpha plane is dropped."""
    if array.dtype != np.uint8:
        raise UserError(f"An array of {array.dtype} is no image; pass uint8 values from 0 to 255.")
    if array.size and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)):
        coloured: NDArray[np.uint8] = cv2.cvtColor(array, cv2.COLOR_GRAY2BGR)
        return coloured
    if array.size and array.ndim == 3 and array.shape[2] in (3, 4):
        return array[..., :3]
    shape = " x ".join(str(side) for side in array.shape)
    raise UserError(f"An array of {shape} is no image; pass height x width x 3, and several images as a list.")


def _find_files(text: str) -> list[str]:
    path = Path(text)
    if path.is_dir():
        return _files_in(path)
    if path.is_file():
        return _listed_in(path) if path.suffix.lower() == ".txt" else [_still(path)]
    if "://" in text:
        raise UserError(f"{shown(text)} is an address, and nothing is downloaded; save the image and name its file.")
    if text.isdecimal() or text == "screen":
        raise _no_camera(text)
    if glob.has_magic(text):
        found = sorted(
            entry for entry in glob.glob(text, recursive=True) if Path(entry).suffix.lower() in IMAGE_SUFFIXES
        )
        if not found:
            raise UserError(f"No image matches {text}; check the pattern.")
        return found
    raise UserError(f"There is no file or folder {text}; check the path.")


def _no_camera(source: str | int) -> UserError:
    return UserError(f"source={source} means a camera or the screen, which is not read; save pictures and name these.")


def _files_in(folder: Path) -> list[str]:
    found = sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found and (folder / "weights" / "best.safetensors").is_file():
        raise UserError(f"{folder} is a run and holds no images; write model={folder}, and what to look at besides.")
    if not found:
        raise UserError(f"The folder {folder} holds no images; for those in folders below it use '{folder}/**/*.jpg'.")
    return found


def _still(path: Path) -> str:
    if path.suffix.lower() in _VIDEO_SUFFIXES:
        raise UserError(f"{path} is a video, which is not read; save its frames as pictures and name their folder.")
    return str(path)


def _listed_in(path: Path) -> list[str]:
    """Read a list with one file, folder or pattern per line, relative to the working folder or to the list."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a list of images as text; write one path per line.") from error
    found: list[str] = []
    for line in filter(None, lines):
        beside = path.parent / line
        found += _find_files(line if Path(line).exists() or not beside.exists() else str(beside))
    if not found:
        raise UserError(f"The list {path} names no images; write one path per line.")
    return found
