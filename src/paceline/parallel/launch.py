"""The launcher: runs a function in several processes of this machine by torch's elastic agent, and returns its result.

```
this process     function, arguments --cloudpickle--> folder/call.pkl
elastic agent    python -m paceline.parallel.worker folder      once per rank; __main__ is never imported again
rank 0           result --> folder/result.pkl      any rank: fault --> folder/fault.json
```

The same run on many nodes is `torchrun --nnodes N --nproc-per-node M -m paceline train ...`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import cloudpickle
import psutil

from paceline.errors import UserError
from paceline.parallel.fault import INTERRUPTED, MISTAKEN, Fault, RankError
from paceline.parallel.heartbeat import FAULT_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

P = ParamSpec("P")
T = TypeVar("T")

CALL, RESULT, FAULT = "call.pkl", "result.pkl", "fault.json"
STOP_S = 20
"""How long ranks may take to stop when this process is asked to."""


def launch(num_ranks: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in `num_ranks` processes at once and return what rank 0 returns.

    Functions and classes of a script or a notebook travel by value. Raises UserError and KeyboardInterrupt as the
    rank that failed did, else RankError, whose message names rank, host, step and phase.
    """
    with tempfile.TemporaryDirectory(prefix="paceline-") as name, _quiet_agent(), _signals_restored():
        folder = Path(name)
        _write_call(folder, function, args, kwargs, environment=_environment(folder, num_ranks))
        error = _run_agent(folder, num_ranks)
        fault = folder / FAULT
        if isinstance(error, KeyboardInterrupt | SystemExit) and not (folder / RESULT).exists():
            raise error
        if fault.exists():
            _raise(Fault.from_json(fault.read_text(encoding="utf-8")))
        if isinstance(error, Exception):
            raise error
        with (folder / RESULT).open("rb") as stream:
            result: T = pickle.load(stream)
        return result


def portable(values: Mapping[str, T]) -> dict[str, T]:
    """Leave out what cannot travel between processes, such as open files."""
    return {name: value for name, value in values.items() if _is_portable(value)}


def _is_portable(value: object) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:  # a value says by code of its own how it is pickled
        return False
    return True


def physical_cores() -> int:
    """Count the cores that this process may use, hyperthreads not among them."""
    logical, physical = psutil.cpu_count() or 1, psutil.cpu_count(logical=False) or 1
    return max(1, len(os.sched_getaffinity(0)) * physical // max(logical, physical))


def _environment(folder: Path, num_ranks: int) -> dict[str, str | None]:
    """Give the settings of the ranks, None to remove one; what the user has set already stays."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, physical_cores() // num_ranks)),
        "GLOO_SOCKET_IFNAME": "lo",  # all ranks are here, and the host's own name need not lead anywhere
    }
    settings: dict[str, str | None] = {key: value for key, value in defaults.items() if key not in os.environ}
    if "ipykernel" in sys.modules:
        settings["FORCE_COLOR"] = None  # the kernel sets it; what the ranks print is copied into a cell as plain text
    return settings | {FAULT_FILE: str(folder / FAULT)}


def _write_call(
    folder: Path,
    function: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    *,
    environment: Mapping[str, str | None],
) -> None:
    try:
        call = cloudpickle.dumps((function, args, dict(kwargs)))
    except Exception as error:
        raise UserError(
            f"What is passed to the ranks cannot be pickled ({error}); keep open files, locks and the like out of "
            "callbacks, or open them in `on_start`."
        ) from error
    # The call is read only after the ranks have the settings and the path that it needs.
    start = {"environment": dict(environment), "path": sys.path}
    (folder / "start.json").write_text(json.dumps(start), encoding="utf-8")
    (folder / CALL).write_bytes(call)


def _run_agent(folder: Path, num_ranks: int) -> BaseException | None:
    """Run the ranks to their end; returns what ended them, None where they all succeeded."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from paceline.parallel.compat import launch_config

    config = launch_config(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        stop_s=STOP_S,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "paceline.parallel.worker", str(folder))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        what = "was killed" if failure.exitcode == -signal.SIGKILL else f"ended with status {failure.exitcode}"
        return RankError(Fault(rank=rank, host=socket.gethostname(), step=0, phase="start", what=what))
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            return KeyboardInterrupt()
        return SystemExit(128 + error.sigval)
    return None


def _raise(fault: Fault) -> None:
    if fault.status == MISTAKEN:
        raise UserError(fault.what)
    if fault.status == INTERRUPTED:
        raise KeyboardInterrupt
    raise RankError(fault)


@contextlib.contextmanager
def _quiet_agent() -> Iterator[None]:
    """Hide what the agent logs about the processes that it ends: the fault says why."""
    importlib.import_module("torch.distributed.launcher.api")  # makes the loggers, each with a level of its own
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    """Put back the handlers that the agent replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
