"""Prefixes of the keys of a state, by which the states of several owners go into one file."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")


def with_prefix(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """Put `prefix.` before every key."""
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """Pick the entries whose key starts with `prefix.`, and take it off."""
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}
