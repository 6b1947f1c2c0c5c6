"""Two ranks choose who draws and who decodes: what one of them cannot do ends both, with one sentence."""

from __future__ import annotations

from typing import Any

import pytest
from worlds import Case, run_world

from paceline.data.shapes import ShapesConfig, ensure


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks were told in every case; a case that hangs ends them all."""
    data = ensure(tmp_path_factory.mktemp("shapes"), ShapesConfig(train=4, val=2))
    cases: dict[str, dict[str, Any]] = {
        "all can": {"what": "", "unable": ()},
        "none can": {"what": "renderer", "unable": (0, 1)},
        "none can, asked for": {"what": "renderer", "unable": (0, 1), "render": "device"},
        "a defect": {"what": "renderer", "unable": (1,), "mistake": False},
    }
    for rank in (0, 1):
        cases[f"renderer, auto, {rank}"] = {"what": "renderer", "unable": (rank,)}
        cases[f"renderer, device, {rank}"] = {"what": "renderer", "unable": (rank,), "render": "device"}
        cases[f"codec, device, {rank}"] = {"what": "codec", "unable": (rank,), "decode": "device"}
    return run_world(
        tmp_path_factory.mktemp("two"),
        2,
        {name: Case("choice_cases", "choose", {"data": data} | case) for name, case in cases.items()},
    )


@pytest.mark.parametrize("what", ["renderer, auto", "renderer, device", "codec, device"])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_cannot_do_is_said_on_both(two: dict[str, Any], what: str, rank: int) -> None:
    first, second = two[f"{what}, {rank}"]
    assert first == second
    assert first.startswith("UserError: 1 of 2 ranks cannot do what the others can;")
    assert first.endswith(f"rank {rank}: It needs Triton.")


def test_what_all_can_do_is_done_and_what_none_can_is_done_by_the_host(two: dict[str, Any]) -> None:
    assert two["all can"] == ["the device"] * 2
    assert two["none can"] == ["the host"] * 2
    assert two["none can, asked for"] == ["NowhereError: It needs Triton."] * 2


def test_a_defect_is_raised_as_it_is_where_it_is(two: dict[str, Any]) -> None:
    first, second = two["a defect"]
    assert second == "RuntimeError: a defect"
    assert first.endswith("rank 1: a defect")
