"""Palette: colours that go together, red, green and blue in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

Colour = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Palette:
    """The colours of one scene."""

    ground: tuple[Colour, Colour]
    """The background runs from one to the other."""
    inks: tuple[Colour, ...]
    """Colours of shapes."""


def _palette(ground: str, inks: str) -> Palette:
    def colours(text: str) -> tuple[Colour, ...]:
        numbers = [int(word, 16) for word in text.split()]
        return tuple(((number >> 16) / 255, (number >> 8 & 255) / 255, (number & 255) / 255) for number in numbers)

    first, second = colours(ground)
    return Palette(ground=(first, second), inks=colours(inks))


PALETTES = (
    _palette("efe7d8 d9ccb5", "264653 2a9d8f e3b04b f08a4b d9573c"),  # harbour
    _palette("1c2040 323a6b", "f2a65a efd07a f25f5c 70c1b3 e8e9f3 9a8cff"),  # night
    _palette("dfe9cb b9d3ae", "386641 6a994e bc4749 f7f3dc a7523f ee9b00"),  # meadow
    _palette("f3e9f0 dcc6d8", "5b2a86 9a4c95 e36588 f29191 2d3047 419d78"),  # plum
    _palette("4a5a66 35414b", "f1f1ee f6c90e ff7a5a 59c9a5 8fb8ed"),  # slate
    _palette("f4d9b0 e0b273", "8c2f39 b23a48 1f4e5f fff1dc 461220 2f7f79"),  # desert
    _palette("e4f1f6 b7d8e6", "0b3954 087e8b ff5a5f c81d25 f4b942 5c6b9c"),  # ice
    _palette("22372b 35573f", "f3e9d2 c6dabf e8a33d d66853 88d498 f4d35e"),  # forest
    _palette("fbe4e0 efbdb6", "7a1f3d c9405b 3b5249 519872 f29e4c 34344a"),  # rose
    _palette("f7f5ef e2dccd", "161b28 b91c1c 2450c8 ca8a04 0f766e"),  # print
    _palette("0b3c49 15606f", "f9dc5c f4faff ed6a5a 7fd8be f7b267"),  # sea
    _palette("e3d0c9 c7a59c", "22223b f5ece7 4a4e69 7b2d26 2f5d50 f0c987"),  # clay
    _palette("35243b 5a3a5e", "f6bd60 f7ede2 f28482 84dccf b8a1ff"),  # aubergine
    _palette("d8e2dc a9c0b8", "3d405b e07a5f 81523f fdf6e3 2f6690 e9b44c"),  # mist
)
