from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np


@pytest.fixture
def pixels() -> Callable[[Path], np.ndarray]:
    """Read a picture back as RGB."""

    def read(path: Path) -> np.ndarray:
        image = cv2.imread(str(path))
        assert image is not None, path
        return image[..., ::-1]

    return read
