"""Slots: what each random number of a sample decides."""

from __future__ import annotations

from enum import IntEnum


class Slot(IntEnum):
    """Places in the random numbers of a sample; a new one at the end changes none of the others.

    Where a picture takes much more than a number (a second picture, the objects to paste), its slot is a key from
    which further numbers hang (`draws.numbers`); those of further pictures are in the same slots.
    """

    MOSAIC = 0
    CENTRE_X = 1
    CENTRE_Y = 2
    PARTNER_1 = 3
    PARTNER_2 = 4
    PARTNER_3 = 5
    ZOOM = 6
    ANGLE = 7
    SHEAR_X = 8
    SHEAR_Y = 9
    SHIFT_X = 10
    SHIFT_Y = 11
    FLIP_X = 12
    FLIP_Y = 13
    HUE = 14
    SATURATION = 15
    VALUE = 16
    PERSPECTIVE_X = 17
    PERSPECTIVE_Y = 18
    GREY = 19
    SWAP = 20
    MIXUP = 21
    CUTMIX = 22
    COPY_PASTE = 23
    SAMPLE = 24
    """The image of a further picture."""
    SECOND = 25
    """Key of the second picture."""
    SHARE = 26
    """Key of the share that a second picture has."""
    CUT = 27
    """Key of the rectangle that is cut out for it."""
    PASTED = 28
    """Key of the picture that objects are taken from, and of the objects."""
    HOOK = 29
    """Seed of the user's own function."""
