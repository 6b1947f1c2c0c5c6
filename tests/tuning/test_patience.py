"""Patience: a locked storage is asked again, a dead one is named."""

from __future__ import annotations

import pytest
from optuna.exceptions import StorageInternalError

from paceline.errors import UserError
from paceline.tuning.patience import patiently


def test_it_waits_until_the_storage_answers() -> None:
    pauses: list[float] = []

    def call() -> str:
        if len(pauses) < 4:
            raise StorageInternalError("locked")
        return "answer"

    assert patiently(call, clock=lambda: sum(pauses), sleep=pauses.append) == "answer"
    assert pauses == sorted(pauses)


def test_it_gives_up_in_the_end() -> None:
    pauses: list[float] = []

    def call() -> str:
        raise StorageInternalError("gone")

    with pytest.raises(UserError, match="gone"):
        patiently(call, longest_s=30, clock=lambda: sum(pauses), sleep=pauses.append)
    assert 30 <= sum(pauses) <= 45


def test_other_errors_come_through() -> None:
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 // 0)
