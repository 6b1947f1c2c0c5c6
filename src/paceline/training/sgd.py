"""SGD with Nesterov momentum whose rates lie on the device, so that a captured step follows the schedule.

torch's fused SGD takes the learning rate as a tensor, the momentum m as a number only. With it as a factor instead:

```
g   = g + wd w                      weight decay
buf = m buf                         by a factor on the device; by 1 where the update is to be left out
buf = buf + g;  w = w - (lr m) buf  fused, momentum 1, rate lr m
w   = w - lr g                      fused, no momentum
```
which is buf = m buf + g; w = w - lr (g + m buf), as in torch.optim.SGD. What it costs beside the one operation that
takes numbers is in docs/decisions/0050. Where kernels can be used, one does it all (`lists.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from paceline.lists import descend
from paceline.training.optimizer import Optimizer, rates_on_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor


class Sgd(Optimizer):
    """Changes parameters that have a gradient; its state is a `momentum_buffer` per parameter, there from the start.

    `lr` and `momentum` of each group are 0-dim float32 tensors beside the parameters; they are changed in place. Weight
    decay may change the gradients in place, too.
    """

    def __init__(
        self, groups: Iterable[Mapping[str, Any]], *, lr: float, momentum: float, nesterov: bool = True
    ) -> None:
        """Take groups of `params` with their `weight_decay`; `lr` and `momentum` are where all of them start."""
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=0.0)
        for group in self.param_groups:
            rates_on_device(group, "lr", "momentum")
            for parameter in group["params"]:
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}

    def _apply(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        lr, momentum, found_inf = group["lr"], group["momentum"], self.found_inf
        walk = self._walks.over(parameters, buffers, moving=gradients)
        if walk is not None:
            decay, nesterov = group["weight_decay"], group["nesterov"]
            rates = {"lr": lr, "momentum": momentum, "left_out": self._left_out(lr)}
            descend(walk, **rates, weight_decay=decay, nesterov=nesterov)
            return
        if group["weight_decay"] != 0:
            torch._foreach_add_(gradients, parameters, alpha=group["weight_decay"])
        torch._foreach_mul_(buffers, momentum if found_inf is None else torch.where(found_inf > 0, 1.0, momentum))
        fixed: dict[str, Any] = {
            "weight_decay": 0.0,
            "dampening": 0.0,
            "nesterov": False,
            "maximize": False,
            "is_first_step": False,
            "grad_scale": None,
            "found_inf": found_inf,
        }
        if not group["nesterov"]:
            torch._fused_sgd_(parameters, gradients, buffers, momentum=1.0, lr=lr, **fixed)
            return
        torch._fused_sgd_(parameters, gradients, buffers, momentum=1.0, lr=lr * momentum, **fixed)
        torch._fused_sgd_(parameters, gradients, [], momentum=0.0, lr=lr, **fixed)
