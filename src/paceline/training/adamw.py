"""AdamW (arXiv 1711.05101) by torch's fused operation or a kernel over lists, its learning rate on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from paceline.lists import adapt
from paceline.training.optimizer import Optimizer, rates_on_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor


class AdamW(Optimizer):
    """Adam with weight decay apart from the gradient; its state is named as torch.optim.AdamW names it.

    `lr` of each group is a 0-dim float32 tensor beside the parameters, changed in place; `betas` are numbers.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        """Take groups of `params` with their `weight_decay`; `lr` is where all of them start."""
        super().__init__(groups, lr=lr, betas=betas, eps=1e-8, weight_decay=0.0)
        for group in self.param_groups:
            rates_on_device(group, "lr")
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    def _apply(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        averages, squares, steps = (
            [self.state[parameter][name] for parameter in parameters] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        walk = self._walks.over(parameters, averages, squares, moving=gradients)
        counted = None if walk is None else self._walks.over(steps)
        if walk is not None and counted is not None:
            rates = {"lr": group["lr"], "left_out": self._left_out(group["lr"])}
            fixed = {"weight_decay": group["weight_decay"], "eps": group["eps"], "betas": group["betas"]}
            adapt(walk, counted, **rates, **fixed)
            return
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            parameters,
            gradients,
            averages,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=self.found_inf,
        )
        if self.found_inf is not None:  # an update that was left out does not count
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))
