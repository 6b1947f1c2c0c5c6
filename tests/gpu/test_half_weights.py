"""Half weights on a CUDA device: a training with them, and one whose weights are left to autocast."""

from __future__ import annotations

import pytest
import torch
from steps import make_step, run, works

from paceline.models.registry import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_a_training_is_that_of_autocast(amp_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> list[list[float]]:
        torch.manual_seed(0)
        network = build_model("yolo11n", 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = make_step("SGD", network=network, dtype=torch.float32, device="cuda", amp_dtype=amp_dtype)
        return [said.tolist() for said in run(step, works(4, device="cuda"))]

    by_nodes = trained()
    monkeypatch.setattr("paceline.models.operations.half_weights.autocast_type", lambda values: None)
    alone = trained()
    assert by_nodes[0] == alone[0], "all that is forward"
    for found, right in zip(by_nodes, alone, strict=True):
        assert found == pytest.approx(right, rel=1e-2), "cuDNN may add up gradients in another order"
