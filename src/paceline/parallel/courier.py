"""The courier: a thread that carries the beats of a rank to the store, and those of the others back."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING

from paceline.parallel.fault import Fault
from paceline.parallel.lookout import Beat, watched_ranks
from paceline.parallel.warden import Process, space_of_processes

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from paceline.parallel.rank import Rank

PERIOD_S = 1.0
"""Time between two rounds."""


class Courier:
    """Carries beats to the store and back on a thread of its own, which may hang there without hurting anybody."""

    def __init__(self, store: Store, rank: Rank) -> None:
        """Prepare; `store` is a connection that nothing else uses."""
        self._store = store
        self._rank = rank
        self._beat: Beat | None = None
        self._outbox: Fault | None = None
        self._wake = threading.Event()
        self._answered = threading.Condition()
        self._leaving = False
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self.beats: dict[int, Beat] = {}
        """What the watched ranks said last."""
        self.people: dict[int, dict[str, str | int]] = {}
        """Host, node and process of every rank; empty until all have come."""
        self.verdict: Fault | None = None
        """The fault that all end with."""
        self.rounds = 0
        """Times that the store has answered."""
        self.stuck_since: float | None = None
        """Monotonic second since when an answer of the store is awaited."""

    def start(self, beat: Beat) -> None:
        """Start, with a first beat."""
        self._beat = beat
        self._thread.start()

    def carry(self, beat: Beat) -> None:
        """Take a beat with the next round."""
        self._beat = beat

    def post(self, fault: Fault, wait_s: float) -> Fault:
        """Ask for a verdict; the one that was first comes back, or our own where the store does not answer."""
        self._outbox = fault
        self._wake.set()
        with self._answered:
            self._answered.wait_for(lambda: self.verdict is not None, wait_s)
        return self.verdict or fault

    def leave(self, beat: Beat, wait_s: float) -> None:
        """Carry a last beat and end."""
        self._beat, self._leaving = beat, True
        self._wake.set()
        self._thread.join(wait_s)

    def _run(self) -> None:
        own = Process.of(os.getpid())
        person = {"host": self._rank.host, "node": self._rank.node, "pid": own.pid, "started": own.started}
        person["space"] = space_of_processes()
        arrived = False
        while True:
            self.stuck_since, leaving = self.stuck_since or time.monotonic(), self._leaving
            try:
                if not arrived:
                    self._store.set(f"who/{self._rank.rank}", json.dumps(person))
                self._round()
                if not arrived:
                    self._store.add("arrived", 1)
                    arrived = True
                if not self.people and self._store.add("arrived", 0) >= self._rank.world:
                    names = [f"who/{rank}" for rank in range(self._rank.world)]
                    self.people = dict(enumerate(map(json.loads, self._store.multi_get(names))))
                self.stuck_since = None
                self.rounds += 1
            except RuntimeError:  # the store's host is gone; `stuck_since` says for how long
                if leaving:
                    return
            if leaving:
                return
            self._wake.wait(PERIOD_S)
            self._wake.clear()

    def _round(self) -> None:
        store, outbox = self._store, self._outbox
        assert self._beat is not None
        store.set(f"beat/{self._rank.rank}", self._beat.to_json())
        if outbox is not None:
            store.compare_set("verdict", "", outbox.to_json())
        if self.people:
            others = watched_ranks(self._rank.rank, self._rank.world)
            values = store.multi_get([f"beat/{rank}" for rank in others])
            self.beats = {rank: Beat.from_json(value) for rank, value in zip(others, values, strict=True)}
        if store.check(["verdict"]):
            with self._answered:
                self.verdict = Fault.from_json(store.get("verdict").decode())
                self._answered.notify_all()
