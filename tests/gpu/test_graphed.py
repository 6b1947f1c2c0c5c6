"""Steps as CUDA graphs, against the eager step there; tests/training does it on a recorder, without a GPU."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch
from steps import everything, make_step, run, works
from waiting import errors_where_the_host_waits
from worlds import Case, run_world

from paceline.models.registry import build_model
from paceline.training.graphed import CudaCapture, GraphedStep

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.models.graph import DetectionModel
    from paceline.training.step import EagerStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
BOUNDS = {None: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Of losses and weights, by type of autocast: sums by atomics differ from run to run, with or without a graph."""
CHAOS = 8.0
"""How many times further than two eager runs from each other a graphed one may be where these are beyond a bound."""


def seeded(name: str) -> DetectionModel:
    torch.manual_seed(0)
    return build_model(name, 3)


def yolo(optimizer: str, amp_dtype: torch.dtype | None) -> EagerStep:
    network = seeded("yolo11n").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scale = 64.0 if amp_dtype is torch.float16 else 1.0
    return make_step(
        optimizer, network=network, dtype=torch.float32, device="cuda", amp_dtype=amp_dtype, loss_scale=scale
    )


def apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference, as a share of values above 1."""
    pairs = zip(found, expected, strict=True)
    return max(float(((one - other).abs() / other.abs().clamp(min=1)).max()) for one, other in pairs if one.numel())


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_warm_up_by_graphs_is_the_eager_one(optimizer: str, amp_dtype: torch.dtype | None) -> None:
    """AdamW's first steps are as long for a gradient of rounding alone, so that eager runs part from each other too."""
    asked = works(30, optimizer, device="cuda")
    eager, again, inner = (yolo(optimizer, amp_dtype) for _ in range(3))
    losses, losses_again = run(eager, asked), run(again, asked)
    said = run(GraphedStep(inner, CudaCapture(DEVICE)), asked)
    state, state_again, found = (everything(step)["state"] for step in (eager, again, inner))
    for mine, theirs, others in ((said, losses, losses_again), (found, state, state_again)):
        bound = max(BOUNDS[amp_dtype], CHAOS * apart(others, theirs))
        assert apart(mine, theirs) < bound, (apart(mine, theirs), apart(others, theirs))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_small_detector_in_double_is_the_eager_one_to_the_last_digits(optimizer: str) -> None:
    asked = works(30, optimizer, device="cuda")
    eager, inner = make_step(optimizer, device="cuda"), make_step(optimizer, device="cuda")
    said = run(GraphedStep(inner, CudaCapture(DEVICE)), asked)
    torch.testing.assert_close(said, run(eager, asked), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(everything(inner)["state"], everything(eager)["state"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_each_step_from_the_same_state_in_double_is_the_eager_one(optimizer: str) -> None:
    """What chaos makes of rounding is left out: each step begins where the eager one does."""
    asked = works(30, optimizer, device="cuda")
    eager, inner = (
        make_step(optimizer, network=seeded("yolo11n"), dtype=torch.float64, device="cuda") for _ in range(2)
    )
    step = GraphedStep(inner, CudaCapture(DEVICE))
    for work in asked:
        with torch.no_grad():
            torch._foreach_copy_(inner.state(), eager.state())
        said, expected = run(step, [work]), run(eager, [work])
        assert apart(said, expected) < 1e-9
        assert apart(everything(inner)["state"], everything(eager)["state"]) < 1e-6
    assert {(key.adds, key.completes) for key, graph in step._graphs.items() if graph is not None} == {
        (adds, completes) for adds in (False, True) for completes in (False, True)
    }


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_accumulating_and_completing_never_wait_for_the_gpu(optimizer: str, graphs: bool) -> None:
    asked = works(30, optimizer, device="cuda", boxes=(4,))
    inner = yolo(optimizer, torch.bfloat16)
    step = GraphedStep(inner, CudaCapture(DEVICE)) if graphs else inner
    run(step, asked[:24])  # all graphs are recorded, libraries have chosen their kernels
    with errors_where_the_host_waits():
        said = run(step, asked[24:])
    assert {work.completes for work in asked[24:]} == {True, False}
    assert all(bool(torch.isfinite(values).all()) for values in said)


def test_recording_leaves_everything_as_it_was() -> None:
    step = yolo("SGD", torch.bfloat16)
    asked = [work for work in works(6, device="cuda", boxes=(4,)) if work.completes]
    run(step, asked[:2])
    before = everything(step)
    graphed = GraphedStep(step, CudaCapture(DEVICE))
    key = graphed._key(asked[2].batch, completes=True)
    assert graphed._record(key, asked[2].batch) is not None
    after = everything(step)
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert torch.equal(after["random"], before["random"])


def test_threads_may_lock_pages_and_query_events_while_a_step_is_recorded() -> None:
    stop, failures = threading.Event(), []

    def load() -> None:
        try:
            while not stop.is_set():
                pages = torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.query()
                del pages
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        step = yolo("SGD", None)
        graphed = GraphedStep(step, CudaCapture(DEVICE))
        run(graphed, works(6, device="cuda"))
        assert graphed._graphs
        assert all(graph is not None for graph in graphed._graphs.values())
    finally:
        stop.set()
        thread.join()
    assert not failures


def test_ddp_over_nccl_by_graphs_is_the_eager_one(tmp_path: Path) -> None:
    case = Case("device_cases", "ddp_by_graphs", {"device": "cuda"})
    result = run_world(tmp_path, 1, {"ddp": case}, backend="cpu:gloo,cuda:nccl")["ddp"]
    assert result["graphs"][0] >= 2
    assert result["graphs"][1] == 1
    assert max(result["differences"]) < 1e-6, result
