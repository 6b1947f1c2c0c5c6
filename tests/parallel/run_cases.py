"""Whole runs of `train` on several ranks, as the ranks of a world see them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from paceline.callbacks import Callback
from paceline.commands.train import train
from paceline.errors import UserError
from paceline.options import TrainOptions
from paceline.records import RunFolder
from paceline.training.checkpoint import load_resume_point, save_resume_point


class Losses(Callback):
    """Notes the losses of each epoch."""

    def __init__(self) -> None:
        self.losses: list[tuple[float, float, float]] = []

    def on_epoch(self, record: Any) -> None:
        self.losses.append((record.loss.box, record.loss.cls, record.loss.dfl))


def run(**flat: Any) -> dict[str, Any]:
    """Train with these options on all ranks; returns what rank 0 saw, and what any rank could not do."""
    losses = Losses()
    try:
        result = train(TrainOptions.from_flat(flat), [losses] if dist.get_rank() == 0 else [])
        outcome: tuple[str, Any] = "", result.evaluation
        folder = str(result.folder.path)
    except UserError as error:
        outcome, folder = (str(error), None), ""
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    return {
        "folder": folder,
        "losses": losses.losses,
        "errors": [error for error, _ in outcomes],
        "evaluations": [evaluation for _, evaluation in outcomes],
    }


def go_on(folder: str, **layout: Any) -> dict[str, Any]:
    """Let a copy of a run go on for one epoch more, under another layout, as if it had been stopped before that."""
    copied = Path(f"{folder}-on")
    file = copied / "weights" / "resume.safetensors"
    if dist.get_rank() == 0:
        shutil.copytree(folder, copied)
        point = load_resume_point(file)
        point.values["state"]["epochs"] += 1
        save_resume_point(file, point)
        RunFolder(path=copied).mark("")
    dist.barrier()
    return run(resume=str(copied), device="cpu", **layout)
