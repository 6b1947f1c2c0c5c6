"""One trial of `paceline tune`, as a process of its own: waits for its options, trains, and says how it ended.

Started as `python -m paceline.commands.trial CORES` by `paceline.tuning.process`, which shows the exchange.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from paceline.tuning.search import ENDING_FILE

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.commands.train import TrainResult


def main() -> int:
    """Run the trial that the first line of the input describes; the exit status is 0 where it ended by itself."""
    cores = {int(core) for core in sys.argv[1].split(",")}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    import torch

    from paceline.commands.train import train
    from paceline.options import TrainOptions

    torch.set_num_threads(len(cores))
    line = sys.stdin.buffer.readline()
    if not line:
        return 0  # the search ended before there was anything to do
    threading.Thread(target=_end_with_the_search, args=(sys.stdin.buffer,), daemon=True).start()
    order = json.loads(line)
    folder = Path(order["folder"])
    _log_into(folder / "log.txt")
    told = ending_of(lambda: train(TrainOptions.from_flat(order["options"])))
    (folder / ENDING_FILE).write_text(json.dumps(told), encoding="utf-8")
    return 0


def ending_of(run: Callable[[], TrainResult]) -> dict[str, object]:
    """Carry out a run and say how it ended, as `paceline.tuning.search.read_ending` reads it."""
    import torch

    from paceline.errors import UserError
    from paceline.training.divergence import DivergedError

    ending, reason = "failed", ""
    is_mendable = False
    try:
        is_whole = run().end.reason != "preempted"
        ending, reason = ("complete", "") if is_whole else ("interrupted", "a signal asked it to end")
    except DivergedError as error:
        ending, reason = "diverged", str(error)
    except UserError as error:
        reason, is_mendable = str(error), True
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = f"it ran out of memory ({str(error).splitlines()[0] if str(error) else 'no detail'})"
    except Exception as error:
        logging.getLogger("paceline").error("%s", traceback.format_exc())
        reason = f"{type(error).__name__}: {error}"
    return {"ending": ending, "reason": reason, "is_mendable": is_mendable}


def _log_into(file: Path) -> None:
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("paceline")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _end_with_the_search(stream: BinaryIO) -> None:
    """Nothing more ever comes through the input, so its end means that the search is gone: end as well.

    Read past the stream, whose lock would otherwise abort the interpreter when the trial has ended by itself.
    """
    while os.read(stream.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
