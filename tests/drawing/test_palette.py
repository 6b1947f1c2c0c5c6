from __future__ import annotations

import numpy as np
import pytest

from paceline.drawing.palette import class_colour, class_colours, ink_on, oklab, to_hex


def test_a_palette_is_the_beginning_of_every_larger_one() -> None:
    large = class_colours(300)
    for count in (1, 3, 40, 80, 257):
        assert np.array_equal(class_colours(count), large[:count])


def test_a_class_has_the_colour_of_its_row() -> None:
    table = class_colours(600)
    for label in (0, 9, 79, 255, 256, 599):
        assert class_colour(label) == tuple(table[label].tolist())


@pytest.mark.parametrize(("count", "least"), [(10, 0.09), (40, 0.055), (80, 0.045), (1000, 0.01)])
def test_colours_lie_apart_in_oklab(count: int, least: float) -> None:
    places = oklab(class_colours(count))
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert distances.min() > least


def test_ink_has_the_contrast_that_wcag_asks_of_text() -> None:
    for label in range(200):
        colour = class_colour(label)
        light, dark = sorted((_luminance(colour), _luminance(ink_on(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_oklab_of_known_colours() -> None:
    lab = oklab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]], dtype=np.uint8))
    assert np.allclose(lab, [[1, 0, 0], [0, 0, 0], [0.62796, 0.22486, 0.12585]], atol=1e-4)


def test_hex() -> None:
    assert to_hex((255, 0, 16)) == "#ff0010"


def _luminance(colour: tuple[int, int, int]) -> float:
    def linear(value: float) -> float:
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(part / 255) for part in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
