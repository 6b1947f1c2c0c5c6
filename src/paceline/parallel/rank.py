"""A rank: one process of a run, and where it stands among the others. Without torch."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass

from paceline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Who this process is."""

    rank: int = 0
    world: int = 1
    """Number of processes of the run."""
    local_rank: int = 0
    """Number among the processes of this node."""
    local_world: int = 1
    node: str = "0"
    """What the processes of one node have in common."""
    host: str = "localhost"
    """The node's name for a person."""
    run: str = ""
    """What the processes of one start of one run have in common."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and the log."""
        return self.rank == 0


def number_of_environment(name: str, default: str = "") -> int:
    """Read a number that whoever started the ranks has put into the environment. Raises UserError for anything else."""
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r} in the environment; what starts the ranks has to set it to a number.")
    return int(text)


def rank_of_environment() -> Rank | None:
    """Read what torchrun, Kubeflow and others say in the environment; None where there is nothing, or one process.

    Raises UserError where it makes no sense.
    """
    environment = os.environ
    if "RANK" not in environment or "WORLD_SIZE" not in environment or "MASTER_ADDR" not in environment:
        return None
    world = number_of_environment("WORLD_SIZE")
    if world <= 1:
        return None
    host = socket.gethostname()
    identity = (
        environment.get("TORCHELASTIC_RUN_ID", ""),
        environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        environment["MASTER_ADDR"],
        environment.get("MASTER_PORT", ""),
    )
    return Rank(
        rank=number_of_environment("RANK"),
        world=world,
        local_rank=number_of_environment("LOCAL_RANK", "0"),
        local_world=number_of_environment("LOCAL_WORLD_SIZE", "1"),
        node=f"{host}/{environment.get('GROUP_RANK', '')}",
        host=host,
        run=hashlib.blake2b("\n".join(identity).encode(), digest_size=8).hexdigest(),
    )
