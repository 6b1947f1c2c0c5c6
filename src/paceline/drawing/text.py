"""Text: words as a mask of grey, for labels on pictures; any script that an installed font has."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OTHER_SCRIPTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC",
    "Microsoft YaHei", "Noto Sans Devanagari", "Noto Sans Arabic", "Noto Sans Thai",
)  # fmt: skip


@lru_cache(maxsize=4096)
def text_mask(text: str, size_px: int) -> NDArray[np.uint8]:
    """Coverage HW in 0..255 of one line of text; every mask of one size has the same height and baseline.

    The array is shared and must not be written to. Rendered by matplotlib's FreeType with hinting, which stays
    readable down to 8 px, unlike OpenCV's stroke fonts, and knows more than ASCII.
    """
    ascent, descent = _line(size_px)
    mask = np.zeros((ascent + descent, 1), dtype=np.uint8)
    glyphs, below = _render(text, size_px)
    if glyphs.size:
        mask = np.zeros((ascent + descent, glyphs.shape[1]), dtype=np.uint8)
        top = ascent + below - glyphs.shape[0]
        first, last = max(top, 0), min(top + glyphs.shape[0], mask.shape[0])
        mask[first:last] = glyphs[first - top : last - top]
    mask.flags.writeable = False
    return mask


def one_line(text: str, longest: int = 40) -> str:
    """Fold white space and control characters into single blanks and shorten with an ellipsis."""
    words = "".join(character if character.isprintable() else " " for character in text).split()
    folded = " ".join(words)
    return folded if len(folded) <= longest else folded[: longest - 1].rstrip() + "…"


@lru_cache(maxsize=4096)
def drawable(text: str) -> str:
    """Put a hollow square for every character that no installed font has."""
    if text.isascii():
        return text
    from matplotlib import font_manager

    fonts = [font_manager.get_font([path]) for path in _font_paths(text)]
    return "".join(
        character if any(font.get_char_index(ord(character)) for font in fonts) else "□" for character in text
    )


@lru_cache(maxsize=1)
def fallback_families() -> tuple[str, ...]:
    """Names of the installed fonts for scripts that DejaVu Sans lacks."""
    from matplotlib import font_manager

    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return tuple(name for name in _OTHER_SCRIPTS if name in installed)


@lru_cache(maxsize=64)
def _line(size_px: int) -> tuple[int, int]:
    """Rows above and below the baseline that capitals with accents and descenders take."""
    glyphs, below = _render("ÄÅbgjpqy|", size_px)
    return glyphs.shape[0] - below, below


def _render(text: str, size_px: int) -> tuple[NDArray[np.uint8], int]:
    """Tight mask of the text and the number of its rows that lie below the baseline."""
    from matplotlib import font_manager

    font = font_manager.get_font(_font_paths(text))  # one object per thread
    font.clear()
    font.set_size(size_px, 72)
    font.set_text(drawable(text), 0.0)
    font.draw_glyphs_to_bitmap(antialiased=True)
    return np.array(font.get_image(), dtype=np.uint8), round(font.get_descent() / 64)


def _font_paths(text: str) -> list[str]:
    """DejaVu Sans, which comes with matplotlib, and the other fonts where the text goes beyond Cyrillic."""
    from matplotlib import font_manager, get_data_path

    paths = [f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"]
    if any(ord(character) > 0x52F for character in text):
        paths += [font_manager.findfont(name) for name in fallback_families()]
    return paths
