"""Handover: how a norm leaves the gradient of its input unwritten, for the convolution before to make it on the way.

```
forward    x -- convolution -- y, moments with a handover --> norm -- z
backward   of_weight <-- convolution <-- placeholder, and what is in the handover <-- norm <-- of_z
```
A convolution that can do so gives a handover with the moments of its result, which nobody but the norm knows. A norm
that can leaves there what the gradient is made of, and returns a placeholder that is not looked at; any other norm
leaves nothing, and returns the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Unapplied:
    """What the gradient of y is made of, where z = activation(weight (y - mean) / deviation + bias)."""

    of_z: Tensor
    """BCHW, cells `pitch` apart."""
    pitch: int
    y: Tensor
    """BCHW, channels-last."""
    kept: Tensor
    """Mean C and 1 / deviation C, float32."""
    weight: Tensor
    bias: Tensor
    of_affine: Tensor
    """Gradients of bias C and weight C, float32."""
    silu: bool


@dataclass
class Handover:
    """A place for one of them, during a backward pass."""

    _left: Unapplied | None = None

    def leave(self, unapplied: Unapplied) -> Tensor:
        """Leave what a gradient is made of; return a placeholder of its shape and type, one number again and again."""
        self._left = unapplied
        return unapplied.y[:1, :1, :1, :1].expand_as(unapplied.y)

    def take(self) -> Unapplied | None:
        """Take what was left, if something was."""
        left, self._left = self._left, None
        return left
