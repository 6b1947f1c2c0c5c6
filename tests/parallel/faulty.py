"""A script without a main guard that runs two ranks in which something may go wrong. Run by test_faults.py.

`python faulty.py FOLDER DEED AT`: rank 1, or the rank that DEED ends in, does DEED at step AT. Under torchrun it is a
rank itself. Each rank leaves its process number in FOLDER/rankN, and its last step in FOLDER/stepN.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from paceline.errors import UserError
from paceline.parallel.config import LimitsConfig
from paceline.parallel.fault import RankError
from paceline.parallel.launch import launch
from paceline.parallel.process_group import joined

FOLDER, DEED, AT = Path(sys.argv[1]), sys.argv[2].rstrip("0123456789"), int(sys.argv[3])
CULPRIT = int(sys.argv[2][len(DEED) :] or 1)
LIMITS = LimitsConfig(limit_step=5 if DEED == "hang" else 300)


def do(deed: str) -> None:
    if deed == "raise":
        raise ValueError("the moon is full")
    if deed == "mistake":
        raise UserError("Choose another number.")
    if deed == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 PiB")
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if deed == "hang":
        time.sleep(600)
    if deed == "leave":
        os._exit(3)


def work(deed: str) -> int:
    with joined(backend="gloo", limits=LIMITS) as group:
        rank = group.rank.rank
        (FOLDER / f"rank{rank}").write_text(str(os.getpid()))
        for step in range(1_000_000):
            group.report(step, "step")
            total = torch.ones(1)
            dist.all_reduce(total)
            (FOLDER / f"step{rank}").write_text(str(step))
            if rank == CULPRIT and step == AT:
                do(deed)
            if deed == "stop" and group.preemption.agreed(step):
                return step
            time.sleep(0.01)
    return -1


if "RANK" in os.environ:
    work(DEED)
else:
    try:
        print("result", launch(2, work, DEED))
    except (RankError, UserError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
