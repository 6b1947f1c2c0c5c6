"""The process group of a run: joined where one was started around this process, and otherwise a group of one."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from paceline.errors import UserError
from paceline.parallel.fingerprint import compare
from paceline.parallel.heartbeat import Heartbeat
from paceline.parallel.preemption import Preemption
from paceline.parallel.rank import Rank, number_of_environment, rank_of_environment
from paceline.parallel.store import await_count, value_of
from paceline.parallel.warden import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch._C._distributed_c10d import Store

    from paceline.parallel.config import LimitsConfig

log = logging.getLogger("paceline")

TRIES = 4
"""How often the connections of a group are made; they fail now and then where a machine is busy."""
CONNECT_S = 90.0
"""How long one try may take."""


class ProcessGroup:
    """The processes that train together, as one of them sees them. A group of one does nothing and costs nothing."""

    def __init__(
        self,
        rank: Rank,
        *,
        limits: LimitsConfig,
        store: Store | None = None,
        heartbeat: Heartbeat | None = None,
        preemption: Preemption | None = None,
    ) -> None:
        self.rank = rank
        self.preemption = preemption or Preemption()
        self.heartbeat = heartbeat
        self._limits = limits
        self._store = store

    def report(self, step: int, phase: str) -> None:
        """Say where the main thread is, for the others to judge."""
        if self.heartbeat is not None:
            self.heartbeat.report(step, phase)

    def follow(self, source: Callable[[], tuple[int, str]] | None) -> None:
        """Let the heartbeat ask for (step, phase) once a second."""
        if self.heartbeat is not None:
            self.heartbeat.follow(source)

    @contextmanager
    def first_on_node(self, name: str) -> Iterator[None]:
        """Run the body on one rank of each node first, and on its others when that has ended.

        So what the first leaves in files is there for the others. `name` is used once in a run.
        """
        if self._store is None or self.rank.local_world == 1:
            yield
            return
        key = f"first/{name}/{self.rank.node}"
        if self.rank.local_rank == 0:
            yield
            self._store.set(key, "")
            return
        value_of(self._store, key, limit_s=self._limits.limit_index, option="limit_index")
        yield

    def agree(self, name: str, items: Mapping[str, str]) -> None:
        """Compare what must be equal on all ranks; raises UserError that says what differs, and on which ranks.

        items: what is compared -> its hash or value. Every rank comes here with the same keys.
        """
        if self._store is not None:
            compare(self._store, self.rank, name, items, limit_s=self._limits.limit_start)

    def share(self, name: str, value: Callable[[], str]) -> str:
        """Give all ranks what `value` returns on rank 0, where alone it is called."""
        if self._store is None:
            return value()
        if self.rank.is_main:
            self._store.set(f"share/{name}", value())
        return value_of(self._store, f"share/{name}", limit_s=self._limits.limit_start, option="limit_start")

    def any(self, name: str, value: bool) -> bool:
        """Say whether it is so on some rank; every rank comes here, once for a name, and waits for the others."""
        if self._store is None:
            return value
        self._store.add(f"any/{name}", int(value))
        self.barrier(f"any/{name}/told")
        return self._store.add(f"any/{name}", 0) > 0

    def barrier(self, name: str) -> None:
        """Wait for all ranks, without a collective; only the limits of the heartbeat end the wait."""
        if self._store is not None:
            self._store.add(name, 1)
            await_count(self._store, name, self.rank.world)


@contextmanager
def joined(*, backend: str, limits: LimitsConfig, devices: int = 0) -> Iterator[ProcessGroup]:
    """Join the group that this process was started in, for as long as the body runs; without one, be a group of one.

    backend: gloo, or `cpu:gloo,cuda:nccl`; not used where a group is there already (Ray Train makes its own).
    devices: what the user asked for, 0 for nothing. Raises UserError where the group has another size.
    An exception of the body ends all ranks, and this process with it unless the group was somebody else's.
    """
    foreign = dist.is_available() and dist.is_initialized()
    rank = _rank_of_group() if foreign else rank_of_environment()
    if rank is None or rank.world == 1:
        group = ProcessGroup(Rank(), limits=limits)
        with group.preemption.installed():
            yield group
        return
    if devices not in (0, rank.world):
        raise UserError(f"devices={devices}, but {rank.world} processes were started; leave devices out.")
    if not foreign and "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    store, address, hosting = _connect(rank, foreign=foreign)
    prefix = f"paceline/{rank.run}"
    shared = PrefixStore(prefix, store)
    preemption = Preemption(shared, rank=rank.rank, world=rank.world)
    heartbeat = Heartbeat(
        PrefixStore(prefix, _client(address)),
        rank,
        limits,
        address=f"{address[0]}:{address[1]}",
        preemption=preemption,
        may_exit=not foreign,
    )
    heartbeat.start()
    group = ProcessGroup(rank, limits=limits, store=shared, heartbeat=heartbeat, preemption=preemption)
    with (
        preemption.installed()
    ):  # until a fault is dealt with: the agent's signal must not end the rank that explains it
        try:
            if not foreign:
                _initialise(rank, group, store, backend, limits)
            yield group
            group.follow(None)
            group.report(0, "end")
            group.barrier("end")
        except BaseException as error:
            heartbeat.conclude(error)
            raise
    if not foreign:
        dist.destroy_process_group()
    heartbeat.stop()
    if hosting:
        _outlast_the_others(group)


def _initialise(rank: Rank, group: ProcessGroup, store: Store, backend: str, limits: LimitsConfig) -> None:
    """Make the connections, again where some rank could not; all ranks agree on whether they stand."""
    for number in range(TRIES):
        failure: Exception | None = None
        prefix = f"group/{rank.run}/{number}"
        _world.group_count = 0  # part of the keys in the store, and not the same on all ranks after a failed try
        try:
            dist.init_process_group(
                backend,
                store=PrefixStore(prefix, store),
                rank=rank.rank,
                world_size=rank.world,
                timeout=timedelta(seconds=CONNECT_S),
            )
        except RuntimeError as error:
            failure = error
        if failure is not None:
            store.add(f"{prefix}/failures", 1)
        group.barrier(f"connected/{number}")
        failures = store.add(f"{prefix}/failures", 0)
        if failures == 0:
            longest_s = max(limits.limit_evaluation, limits.limit_index, limits.limit_compile, limits.limit_checkpoint)
            # What a phase may take is for the heartbeat to judge, with a message that says who and where.
            _set_pg_timeout(timedelta(seconds=longest_s + 300))
            return
        log.warning(
            "Try %d of %d to connect the ranks failed on %d of them (%s).", number + 1, TRIES, failures, failure
        )
        if dist.is_initialized():
            dist.destroy_process_group()
    raise UserError(
        f"The ranks could not be connected in {TRIES} tries; check the network between the hosts, and name its "
        "interface by GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME."
    )


def _connect(rank: Rank, *, foreign: bool) -> tuple[Store, tuple[str, int], bool]:
    """Return a store, its address, and whether it lives in this process."""
    if foreign:
        return _own_store(rank)
    address = os.environ["MASTER_ADDR"], number_of_environment("MASTER_PORT")
    if rank.rank > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _client(address), address, False
    return _server(address), address, True


def _server(address: tuple[str, int]) -> TCPStore:
    """Open a store for all ranks; port 0 takes one that is free."""
    wait = timedelta(seconds=CONNECT_S)
    try:
        return TCPStore(*address, is_master=True, wait_for_workers=False, timeout=wait)
    except dist.DistError as error:
        raise UserError(
            f"Rank 0 cannot listen on {address[0]}:{address[1]} ({_cause(error)}); give all ranks another MASTER_PORT."
        ) from error


def _client(address: tuple[str, int]) -> TCPStore:
    """Open a connection of one's own: one that hangs does not hold up the others."""
    try:
        return TCPStore(*address, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_S))
    except dist.DistError as error:
        raise UserError(
            f"Rank 0 cannot be reached at {address[0]}:{address[1]} ({_cause(error)}); see that it runs, and that "
            "MASTER_ADDR and MASTER_PORT lead there."
        ) from error


def _cause(error: Exception) -> str:
    return str(error).splitlines()[0].rpartition("message: ")[2].rstrip(".")


def _own_store(rank: Rank) -> tuple[Store, tuple[str, int], bool]:
    """Start a store in rank 0 of a group that is there already, and tell the others by a collective."""
    found: list[tuple[str, int] | None] = [None]
    store: Store | None = None
    if rank.rank == 0:
        store = server = _server((_own_address(), 0))
        found = [(_own_address(), server.port)]
    dist.broadcast_object_list(found)
    assert found[0] is not None
    return store or _client(found[0]), found[0], store is not None


def _own_address() -> str:
    """Name this host as others can reach it: as the group did, if it said how."""
    named = os.environ.get("MASTER_ADDR")
    if named:
        return named
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _rank_of_group() -> Rank:
    """Say who this process is in a group that is there already."""
    found = rank_of_environment()
    if found is not None and (found.rank, found.world) == (dist.get_rank(), dist.get_world_size()):
        return found
    host = socket.gethostname()
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, host)
    here = [rank for rank, name in enumerate(hosts) if name == host]
    run: list[str] = [os.urandom(8).hex()]
    dist.broadcast_object_list(run)
    return Rank(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        local_rank=here.index(dist.get_rank()),
        local_world=len(here),
        node=host,
        host=host,
        run=run[0],
    )


def _outlast_the_others(group: ProcessGroup) -> None:
    """Keep the store that lives in this process until the others have left it, or 10 s."""
    assert group._store is not None
    end = time.monotonic() + 10
    with contextlib.suppress(RuntimeError):
        while time.monotonic() < end:
            beats = [group._store.get(f"beat/{rank}") for rank in range(group.rank.world)]
            if all(b'"left"' in beat for beat in beats):
                return
            time.sleep(0.05)
