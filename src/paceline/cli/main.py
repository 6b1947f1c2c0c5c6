"""The command `paceline`: finds the command, and turns a user's mistakes into one sentence and an exit status."""

from __future__ import annotations

import difflib
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.cli.console import complain
from paceline.cli.interrupts import STATUS, Interrupts
from paceline.errors import UserError
from paceline.parallel.fault import RankError

if TYPE_CHECKING:
    from collections.abc import Sequence

HELP = """\
usage: paceline COMMAND [OPTIONS]

Trains YOLO object detectors in the least wall-clock time your hardware allows.

commands:
  train         train a detector
  val           score trained weights
  predict       find objects in images
  tune          search hyper-parameters
  bench         measure how fast a network trains here
  models        list the networks
  data check    look for mistakes in a data set
  data plot     draw what a data set holds
  data pack     put a data set into one file
  data convert  write a data set in another format

examples:
  paceline data check path/to/data.yaml
  paceline train data=path/to/data.yaml model=yolo11n epochs=100 imgsz=640
  paceline train resume=true
  paceline val model=runs/train
  paceline predict photos/ model=runs/train
  paceline tune path/to/data.yaml model=yolo11n epochs=30 trials=40
  paceline bench model=yolo11n imgsz=640 batch=16

Options are written imgsz=640, --imgsz 640 or --imgsz=640, as you like;
--config FILE reads them from YAML, such as the config.yaml of an earlier run.
`paceline COMMAND --help` lists the options of a command, -h the most used ones.

  -h, --help    show this help
  --version     show the version
"""

COMMANDS = ("train", "val", "predict", "tune", "bench", "models", "data")
_OTHER_COMMANDS = {
    "export": "export is not there yet; the weights of a run are plain safetensors files",
    "track": "tracking is not offered; predict finds the objects of single images",
    "benchmark": "benchmarks of export formats are not offered; `paceline bench` measures how fast a network trains",
    "checks": "`paceline data check` looks at a data set, `paceline bench` measures this machine",
    "settings": "there are no settings but the options of each command; `--config FILE` reads them from YAML",
    "cfg": "`paceline train --help` lists all options with their defaults, and `--config FILE` reads them from YAML",
    "copy-cfg": "`--config FILE` reads options from YAML, such as the config.yaml that each run has in its folder",
    "solutions": "solutions are not offered; predict finds the objects of single images",
    "login": "there is nothing to log in to: runs stay on this machine",
    "logout": "there is nothing to log in to: runs stay on this machine",
    "hub": "there is nothing to log in to: runs stay on this machine",
}
_GOES_ON = {"train": "a run that has finished an epoch", "tune": "the search"}
"""What goes on after an interruption, by command."""
_OTHER_TASKS = ("segment", "classify", "pose", "obb", "semantic", "depth")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 where a rank failed, 2 after a mistake, 130 after Ctrl-C.

    Without `words` they are those of this process, which then belongs to the command, and so does Ctrl-C.
    """
    try:
        if words is None:
            Interrupts().install()
            _replace_unknown_letters()
        return run(list(sys.argv[1:] if words is None else words))
    except UserError as error:
        complain(str(error))
        return 2
    except RankError as error:
        sys.stderr.write(error.fault.details)
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        command = next((word for word in (sys.argv[1:] if words is None else words) if word != "detect"), "")
        what = _GOES_ON.get(command)
        complain(f"interrupted; {what} goes on by `paceline {command} --resume`." if what else "interrupted.")
        return STATUS
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _replace_unknown_letters() -> None:
    """Print `?` for a letter that the terminal's encoding does not have, rather than end a run because of it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def run(words: list[str]) -> int:
    """Run a command; mistakes come as UserError."""
    for place in (0, 1):  # the task, which the reference's command line may name before the command or after it
        if words[place : place + 1] == ["detect"] and not (place and Path("detect").exists()):
            words = words[:place] + words[place + 1 :]
    if words[:1] == ["help"] and words[1:2] != []:
        words = [*words[1:], "--help"]
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in {"-h", "--help", "help"}:
        print(HELP, end="")
        return 0
    if command in {"--version", "-V", "version"}:
        from paceline import __version__

        print(f"paceline {__version__}")
        return 0
    if command not in COMMANDS:
        raise _unknown_command(command)
    if command == "models":
        from paceline.cli.models import run_models

        return run_models(rest)
    if command == "data":
        from paceline.cli.data import run_data

        return run_data(rest)
    if command == "tune":
        from paceline.cli.tune import run_tune

        return run_tune(rest)
    if command == "bench":
        from paceline.cli.bench import run_bench

        return run_bench(rest)
    from paceline.cli.runs import run_predict, run_train, run_val

    return {"train": run_train, "val": run_val, "predict": run_predict}[command](rest)


def _unknown_command(word: str) -> UserError:
    if word in _OTHER_COMMANDS:
        return UserError(f"{_OTHER_COMMANDS[word]}.")
    if word.startswith(("mode=", "task=")):
        return UserError(f"The command comes first, without {word}: write `paceline train data=... model=yolo11n`.")
    if word in _OTHER_TASKS:
        return UserError(f"There is no task {word}: only detection is offered; write `paceline train ...`.")
    if word.startswith("-") or "=" in word:
        return UserError(f"Name the command before {word}: one of {', '.join(COMMANDS)}.")
    close = difflib.get_close_matches(word.lower(), COMMANDS, n=1, cutoff=0.5)
    if close:
        return UserError(f"There is no command {word}; did you mean {close[0]}?")
    return UserError(f"There is no command {word}; choose one of {', '.join(COMMANDS)}.")


if __name__ == "__main__":
    sys.exit(main())
