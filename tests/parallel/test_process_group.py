"""Joining the ranks of a run: what is wrong with where they should meet is one sentence."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest
from torch.distributed import HashStore

from paceline.errors import UserError
from paceline.parallel import process_group, store
from paceline.parallel.config import LimitsConfig
from paceline.parallel.process_group import joined

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def port() -> Iterator[int]:
    """A port of this machine that somebody listens on, who has nothing to say."""
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        yield server.getsockname()[1]


def mistake(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """Join with others by these variables, which goes wrong; returns the sentence."""
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process_group, "CONNECT_S", 1.0)
    with pytest.raises(UserError) as caught, joined(backend="gloo", limits=LimitsConfig()):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_variables_that_are_missing_or_make_no_sense_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MASTER_PORT is '' in the environment" in mistake(monkeypatch, RANK="0")
    assert "RANK is 'first' in the environment" in mistake(monkeypatch, RANK="first", MASTER_PORT="1")
    assert "WORLD_SIZE is '2x'" in mistake(monkeypatch, RANK="0", WORLD_SIZE="2x")


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    said = mistake(monkeypatch, RANK="0", MASTER_PORT=str(port))
    assert said.startswith(f"Rank 0 cannot listen on 127.0.0.1:{port} (")
    assert said.endswith("in use); give all ranks another MASTER_PORT.")


def test_a_first_rank_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = mistake(monkeypatch, RANK="1", MASTER_PORT="1")
    assert said.startswith("Rank 0 cannot be reached at 127.0.0.1:1 (")


def test_a_value_comes_when_it_is_set_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = HashStore()
    timer = threading.Timer(0.05, shared.set, ("word", "here"))
    timer.start()
    assert store.value_of(shared, "word", limit_s=0, option="limit_start") == "here"
    timer.join()
    monkeypatch.setattr(store, "_SLACK_S", 0.0)
    with pytest.raises(UserError, match=r"did not come within 0 s; .* raise limit_start"):
        store.value_of(shared, "none", limit_s=0.05, option="limit_start")
