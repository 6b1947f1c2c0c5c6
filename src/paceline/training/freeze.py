"""Freezing: the first nodes of a network keep their weights and their normalisation statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.errors import UserError

if TYPE_CHECKING:
    from torch.nn import Module

    from paceline.models.graph import DetectionModel


def freeze_nodes(network: DetectionModel, number: int) -> tuple[Module, ...]:
    """Stop the gradients of the first `number` nodes; returns their modules, which have to stay in eval mode."""
    count = len(network.nodes)
    if not 0 <= number < count:
        raise UserError(
            f"freeze={number} is not possible; {network.name} has {count} nodes, freeze {count - 1} at most."
        )
    frozen = tuple(node.module for node in network.nodes[:number])
    for module in frozen:
        module.requires_grad_(requires_grad=False)
    return frozen
