"""Kernels of a training step, run by Triton's interpreter wherever a GPU would start them."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline import triton_kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import ModuleType

OF_MODELS = ("moment_kernels", "part_kernels", "joint_kernels", "fused_joint", "narrow_kernels", "narrow_conv")
OF_MODELS += ("norm_kernels", "fused_norm", "stem_kernels", "fused_stem", "pool_kernels", "fused_pool")
OF_MODELS += ("bias_kernels", "fused_bias", "depthwise_kernels", "depthwise_conv", "doubling_kernels", "doubling")
OF_MODELS += ("end_kernels", "fused_ends")
OF_LOSSES = ("box_kernels", "assign_kernels", "sum_kernels", "fused")
MODULES = ("paceline.power_kernels", *(f"paceline.models.operations.{name}" for name in OF_MODELS))
MODULES += tuple(f"paceline.losses.{name}" for name in OF_LOSSES)


@pytest.fixture(scope="module")
def kernels(interpreting: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[None]:
    """Let Triton's interpreter run all kernels of a training step."""
    with interpreting(*MODULES):
        yield


@pytest.fixture
def started(kernels: None, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the kernels that are started, wherever a GPU would start them."""

    def usable(device: torch.device) -> bool:
        return not triton_kernels.are_left_out()

    def takes_map(values: torch.Tensor) -> bool:
        return values.is_contiguous(memory_format=torch.channels_last) and not triton_kernels.are_left_out()

    for room in ("models.convolution", "models.stem", "parallel.norms"):
        monkeypatch.setattr(f"paceline.{room}.on_gpu", lambda values: True)
    for room in ("models.convolution", "models.stem", "parallel.norms", "models.joint", "losses.detection"):
        monkeypatch.setattr(f"paceline.{room}.usable", usable)
    for room in ("models.blocks", "models.convolution", "models.ends"):
        monkeypatch.setattr(f"paceline.{room}.takes_map", takes_map)
    counts: Counter[str] = Counter()
    for module in (importlib.import_module(name) for name in MODULES):
        if "start_kernel" in vars(module):

            def noted(kernel: Any, *given: Any, start: Any = module.start_kernel, **options: Any) -> None:
                counts[kernel.fn.__name__] += 1
                start(kernel, *given, **options)

            monkeypatch.setattr(module, "start_kernel", noted)
    return counts
