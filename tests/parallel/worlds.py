"""Worlds: processes that train together, started once per number of ranks, each running a list of cases.

As a script (`python worlds.py FOLDER RANK WORLD BACKEND`) it is one rank: it reads the cases from FOLDER, runs
one after the other in one process group, and rank 0 leaves what each gave in FOLDER. The tests import the rest.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_S = 120


@dataclass(frozen=True)
class Case:
    """A function of a module of these tests, by name, with its arguments; it runs on every rank."""

    module: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


def run_world(
    folder: Path, world: int, cases: dict[str, Case], *, limit_s: float = 300.0, backend: str = "gloo"
) -> dict[str, Any]:
    """Run cases on `world` ranks; returns what rank 0 gave for each. Raises with the logs where a rank failed."""
    return {name: take(path) for name, path in run_to_files(folder, world, cases, limit_s, backend).items()}


def take(path: Path) -> Any:
    """Return what a case gave, and remove its file."""
    result = torch.load(path, weights_only=False)
    path.unlink()
    return result


def run_to_files(
    folder: Path, world: int, cases: dict[str, Case], limit_s: float, backend: str = "gloo"
) -> dict[str, Path]:
    """Run cases on `world` ranks; returns the file that rank 0 left for each, to be taken when it is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.pkl").write_bytes(pickle.dumps(cases))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank), str(world), backend],
            env=environment,
            stdout=(folder / f"rank{rank}.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    end = time.monotonic() + limit_s
    try:
        while any(rank.poll() is None for rank in ranks):
            failed = [number for number, rank in enumerate(ranks) if rank.poll() not in (None, 0)]
            if failed or time.monotonic() > end:
                break
            time.sleep(0.05)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
    if any(rank.returncode for rank in ranks):
        logs = "\n".join(f"rank {n}: {(folder / f'rank{n}.log').read_text()[-3000:]}" for n in range(world))
        raise AssertionError(f"a rank failed or took more than {limit_s:.0f} s:\n{logs}")
    return {name: folder / f"{name}.pt" for name in cases}


def _main(folder: Path, rank: int, world: int, backend: str) -> None:
    torch.set_num_threads(1)
    cases: dict[str, Case] = pickle.loads((folder / "cases.pkl").read_bytes())
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT_S))
    for name, case in cases.items():
        start = time.perf_counter()
        function: Callable[..., Any] = getattr(__import__(case.module), case.function)
        result = function(**case.arguments)
        print(f"{name}: {time.perf_counter() - start:.2f} s", flush=True)
        if rank == 0:
            torch.save(result, folder / f"{name}.pt.part")
            (folder / f"{name}.pt.part").rename(folder / f"{name}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # the others must not wait for this rank
