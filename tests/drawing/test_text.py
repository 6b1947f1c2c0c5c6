from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from paceline.drawing.text import drawable, one_line, text_mask


@pytest.mark.parametrize("size_px", [8, 13, 40])
def test_every_mask_of_one_size_is_as_high(size_px: int) -> None:
    heights = {text_mask(text, size_px).shape[0] for text in ("a", "gjpq", "ÄÉ", "0.87", "", "person 0.9")}
    assert len(heights) == 1


@pytest.mark.parametrize("size_px", [8, 13, 14, 40])
def test_words_stand_on_one_baseline(size_px: int) -> None:
    lowest = {int(text_mask(word, size_px).max(axis=1).nonzero()[0].max()) for word in ("x", "kil", "HLE", "M 17")}
    assert len(lowest) == 1


def test_more_text_takes_more_room() -> None:
    widths = [text_mask("dog 0.87"[:count], 14).shape[1] for count in (1, 2, 3, 5, 6, 7, 8)]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_letters_have_ink() -> None:
    for text in ("x", "ножницы", "Straße", "猫"):
        assert text_mask(text, 12).max() > 128


def test_masks_are_shared_and_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        text_mask("dog", 14)[0, 0] = 1


def test_threads_render_alike() -> None:
    words = [f"class {k}" for k in range(40)]
    alone = [text_mask.__wrapped__(word, 15) for word in words]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda word: text_mask.__wrapped__(word, 15), words))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_one_line() -> None:
    assert one_line("traffic\n\tlight ") == "traffic light"
    assert one_line("a" * 50, 10) == "a" * 9 + "…"
    assert one_line("exactly10!", 10) == "exactly10!"


def test_letters_without_a_font_become_squares() -> None:
    assert drawable("plain") == "plain"
    assert drawable("Straße") == "Straße"
    assert drawable("a\U000f0000b") == "a□b"
