"""The registry: from a network's name to the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.models.catalogue import find_model, model_names
from paceline.models.families.yolo11 import yolo11_nodes
from paceline.models.families.yolov8 import yolov8_nodes
from paceline.models.graph import DetectionModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.models.graph import Node

__all__ = ["FAMILIES", "build_model", "model_names"]

FAMILIES: dict[str, Callable[[str, int], list[Node]]] = {
    "yolov8": yolov8_nodes,
    "yolo11": yolo11_nodes,
}
"""For each family of the catalogue, the function from (size, number of classes) to the nodes."""


def build_model(name: str, num_classes: int) -> DetectionModel:
    """Build a network with fresh weights, drawn from torch's global generator on the current default device.

    Raises `UserError` when the name is not in the catalogue.
    """
    assert num_classes >= 1
    info = find_model(name)
    nodes = FAMILIES[info.family](info.size, num_classes)
    return DetectionModel(nodes, name=name, num_classes=num_classes)
