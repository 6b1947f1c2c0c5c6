"""Trains on a Ray cluster: `python deploy/ray_train.py NUM_WORKERS [--cpu] name=NAME project=FOLDER OPTIONS...`.

Ray Train starts one worker per GPU and makes the process group; Paceline joins it. When a worker is lost Ray starts all
again, and `resume=auto` goes on from the last checkpoint in project/name, a folder that all workers see.
`pip install 'paceline[ray]'` brings Ray. docs/clusters.md says more.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")


def train_on_worker(options: dict[str, object]) -> None:
    """Do one worker's part of the run."""
    from paceline.commands.train import train
    from paceline.options import TrainOptions

    train(TrainOptions.from_flat(options))


def main(words: list[str]) -> None:
    """Train with the options on the command line."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    num_workers, on_cpu = int(words[0]), "--cpu" in words
    options: dict[str, object] = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    if "name" not in options:
        sys.exit("Name the run: name=...")
    options["project"] = str(Path(str(options.get("project", "runs"))).resolve())
    options |= {"resume": "auto"} | ({"device": "cpu"} if on_cpu else {})
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config=options,
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=not on_cpu),
        run_config=RunConfig(
            storage_path=f"{options['project']}/ray",
            name=str(options["name"]),
            failure_config=FailureConfig(max_failures=int(os.environ.get("PACELINE_MAX_FAILURES", "3"))),
        ),
    )
    trainer.fit()
    print(f"The run is in {options['project']}/{options['name']}.")


if __name__ == "__main__":
    main(sys.argv[1:])
