"""The worker: what a rank that the launcher started runs. `python -m paceline.parallel.worker FOLDER`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

from paceline.parallel.fault import Fault
from paceline.parallel.rank import rank_of_environment
from paceline.parallel.warden import end_with_parent


def main(folder: Path) -> None:
    """Carry out the call in `folder`."""
    end_with_parent()
    start = json.loads((folder / "start.json").read_text(encoding="utf-8"))
    for name, value in start["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.path[:] = start["path"]
    try:
        import cloudpickle  # after the settings: what is read here may import torch

        function, args, kwargs = cloudpickle.loads((folder / "call.pkl").read_bytes())
        result = function(*args, **kwargs)
        if int(os.environ["RANK"]) == 0:
            (folder / "result.pkl").write_bytes(cloudpickle.dumps(result))
    except BaseException as error:
        status = _leave_fault(folder, error)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)  # threads of a broken group would wait for ever


def _leave_fault(folder: Path, error: BaseException) -> int:
    """Say what went wrong outside the group, unless a fault is known already."""
    rank = rank_of_environment()
    fault = Fault.of(error, rank=rank.rank if rank else 0, host=socket.gethostname(), step=0, phase="start")
    with contextlib.suppress(FileExistsError), (folder / "fault.json").open("x", encoding="utf-8") as stream:
        stream.write(fault.to_json())
    return fault.status


if __name__ == "__main__":
    main(Path(sys.argv[1]))
