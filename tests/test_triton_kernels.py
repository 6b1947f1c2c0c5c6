"""Whether kernels are used, and what is said where one cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline import triton_kernels


class Kernel:
    """One that cannot be launched."""

    __name__ = "_stubborn"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launched(*arguments: Any, **options: Any) -> None:
            raise self.error

        return launched


def test_what_triton_raises_is_a_runtime_error_that_names_the_kernel_and_the_way_out() -> None:
    with pytest.raises(
        RuntimeError, match=r"_stubborn cannot .* \(ValueError: out of resource\); PACELINE_KERNELS=off"
    ):
        triton_kernels.start_kernel(Kernel(ValueError("out of resource")), (1,))
    error = RuntimeError("CUDA out of memory")
    with pytest.raises(RuntimeError) as caught:
        triton_kernels.start_kernel(Kernel(error), (1,))
    assert caught.value is error


@pytest.mark.parametrize(("capability", "expected"), [((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_pairs_are_compared_from_hopper_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert not triton_kernels.has_pairs(torch.zeros(1))
    monkeypatch.setattr(triton_kernels, "on_gpu", lambda values: True)
    assert triton_kernels.has_pairs(torch.zeros(1, device="meta")) is expected


def test_the_switch_leaves_all_to_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    triton_kernels._works_on.cache_clear()
    monkeypatch.setenv("PACELINE_KERNELS", "off")
    with caplog.at_level("WARNING", logger="paceline"):
        assert not triton_kernels.usable(torch.device("cuda", 3))
    assert "cannot be used on cuda:3: PACELINE_KERNELS is off" in caplog.text
    triton_kernels._works_on.cache_clear()
