from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
from fill_rule import images
from torch import Tensor, nn

from paceline.models.blocks import C2f, Concat
from paceline.models.graph import IMAGES, DetectionModel, Node, Wiring, run_nodes
from paceline.models.registry import build_model

YOLO11_CUTS = {
    4: (4,),
    6: (4, 6),
    8: (4, 6, 8),
    9: (4, 6, 9),
    10: (4, 6, 10),
    13: (4, 10, 13),
    16: (10, 13, 16),
    22: (16, 19, 22),
}
YOLOV8_CUTS = {4: (4,), 6: (4, 6), 9: (4, 6, 9), 12: (4, 9, 12), 15: (9, 12, 15), 18: (9, 15, 18), 21: (15, 18, 21)}


@pytest.mark.parametrize(("name", "cuts"), [("yolo11x", YOLO11_CUTS), ("yolov8s", YOLOV8_CUTS)])
def test_live_values_at_the_cuts_of_the_families(name: str, cuts: dict[int, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        model = build_model(name, 80)
    assert {node: model.live_after(node) for node in cuts} == cuts
    assert model.live_after(-1) == (IMAGES,)
    assert model.live_after(len(model.nodes) - 1) == (len(model.nodes) - 1,)


def test_live_values_are_what_a_search_of_all_later_inputs_finds(filled_model: DetectionModel) -> None:
    nodes = filled_model.nodes
    for cut in range(-1, len(nodes) - 1):
        needed = {value for node in nodes[cut + 1 :] for value in node.inputs if value <= cut}
        assert filled_model.live_after(cut) == tuple(sorted(needed))


@torch.no_grad()
def test_live_values_of_any_cut_suffice_for_the_rest(filled_model: DetectionModel) -> None:
    x, last = images(torch.float64), len(filled_model.nodes)
    whole = filled_model(x)
    for cut in range(1, last):
        front, back = filled_model.segment(0, cut), filled_model.segment(cut, last)
        live = front(x)
        assert front.gives == back.takes == filled_model.live_after(cut - 1)
        assert len(live) == len(back.takes)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(back(*live), whole, strict=True))


def test_segments_in_a_row_are_the_network_and_its_gradient() -> None:
    torch.manual_seed(0)
    model = build_model("yolo11n", 2).double()
    x = images(torch.float64)
    bounds = [0, 5, 9, 11, 17, 23, 24]
    segments = [model.segment(first, stop) for first, stop in itertools.pairwise(bounds)]
    expected = model(x)
    sum(part.square().mean() for part in expected).backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    live: tuple[Tensor, ...] = (x,)
    for segment in segments:
        live = segment(*live)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(live, expected, strict=True))
    sum(part.square().mean() for part in live).backward()
    for before, parameter in zip(gradients, model.parameters(), strict=True):
        assert (before is None) == (parameter.grad is None)
        if before is not None:
            torch.testing.assert_close(parameter.grad, before, rtol=1e-9, atol=1e-12)


def test_segments_keep_the_keys_and_share_the_tensors_of_the_network(filled_model: DetectionModel) -> None:
    bounds = [0, 3, 10, len(filled_model.nodes)]
    segments = [filled_model.segment(first, stop) for first, stop in itertools.pairwise(bounds)]
    pieces = [segment.state_dict(keep_vars=True) for segment in segments]
    whole = filled_model.state_dict(keep_vars=True)
    assert [key for piece in pieces for key in piece] == list(whole)
    assert all(tensor is whole[key] for piece in pieces for key, tensor in piece.items())


@pytest.mark.parametrize(("name", "joins"), [("yolo11n", (12, 15, 18, 21)), ("yolov8n", (11, 14, 17, 20))])
def test_joins_are_left_to_the_nodes_that_take_them(name: str, joins: tuple[int, ...]) -> None:
    """In training, and where that node follows at once; by any way the numbers are the same."""
    torch.manual_seed(0)
    model = build_model(name, 2).double().eval()
    x, last = images(torch.float64), len(model.nodes)
    joined: list[int] = []
    for index in joins:
        model.model[str(index)].register_forward_hook(lambda *_, index=index: joined.append(index))
    found = model(x)
    assert joined == []
    with torch.no_grad():
        expected = model(x)
    assert joined == list(joins)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))

    cut = joins[1] + 1
    live = model.segment(0, cut)(x)
    assert joined == [*joins, joins[1]], "a map that crosses a cut is one"
    outputs = model.segment(cut, last)(*live)
    assert joined == [*joins, joins[1]]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True))


@pytest.mark.parametrize(("again", "calls"), [(0, 0), (1, 1)])
def test_a_join_that_others_take_too_is_carried_out(again: int, calls: int) -> None:
    block = C2f(8, 4, 1, residual=False)
    nodes = [Node(nn.Identity(), (IMAGES,)), Node(Concat(), (0, 0)), Node(block, (1,)), Node(Concat(), (2, again))]
    modules = nn.ModuleDict({str(index): node.module for index, node in enumerate(nodes)})
    joined: list[int] = []
    modules["1"].register_forward_hook(lambda *_: joined.append(1))
    x = torch.rand(2, 4, 3, 3)
    outputs = run_nodes(modules, Wiring([node.inputs for node in nodes]), 0, 4, (x,))
    whole = torch.cat((x, x), dim=1)
    assert len(joined) == calls
    torch.testing.assert_close(outputs, torch.cat((block(whole), whole if again else x), dim=1))


@torch.no_grad()
def test_values_are_freed_as_soon_as_their_last_consumer_ran(filled_model: DetectionModel) -> None:
    made: dict[int, weakref.ref[Tensor]] = {}
    alive: dict[int, tuple[int, ...]] = {}
    hooks = []
    for index, node in enumerate(filled_model.nodes[:-1]):

        def note(_module: nn.Module, _inputs: Any, output: Tensor, index: int = index) -> None:
            alive[index - 1] = tuple(value for value, reference in made.items() if reference() is not None)
            made[index] = weakref.ref(output)

        hooks.append(node.module.register_forward_hook(note))
    filled_model(images(torch.float64))
    for hook in hooks:
        hook.remove()
    # When a node ends, what is alive beside its output is what a cut before it carries.
    for cut, values in alive.items():
        assert values == tuple(value for value in filled_model.live_after(cut) if value != IMAGES)


def test_a_graph_may_give_more_than_two_outputs_and_use_the_images_late() -> None:
    class Head(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            return a + b, a - b, a, b

    nodes = [Node(nn.Tanh(), (IMAGES,)), Node(nn.Sigmoid(), (0,)), Node(Head(), (1, IMAGES))]
    model = DetectionModel(nodes, name="toy", num_classes=1, reg_max=1, strides=(1,))
    x = torch.linspace(-1, 1, 12).view(1, 3, 2, 2)
    outputs = model(x)
    assert len(outputs) == 4
    torch.testing.assert_close(outputs[0], x.tanh().sigmoid() + x)
    assert model.live_after(0) == (IMAGES, 0)


@pytest.mark.parametrize("inputs", [((0,),), ((-1,), (1,)), ((-2,),), ((),)])
def test_a_node_takes_only_what_was_made_before_it(inputs: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(AssertionError):
        Wiring(inputs)


def test_a_size_between_the_strides_is_refused(filled_model: DetectionModel) -> None:
    with pytest.raises(AssertionError, match="multiples"):
        filled_model(torch.zeros(1, 3, 80, 96, dtype=torch.float64))
