"""What a user may set about a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How long, over what, and by which measure hyper-parameters are searched."""

    space: str = ""
    """YAML file with the ranges to search; empty takes the default space, which is written into the search's folder."""
    trials: int = 0
    """Trials of the whole search, those of earlier parts included; 0 has no limit, and needs `time`."""
    objective: str = "ap"
    """What is made as large as possible: `ap`, the best AP of a run, or `ap@600s`, the best within so many seconds."""
    confirm: int = 0
    """Train the best ones and the defaults again with this many other seeds, beyond `time`, and choose by the mean."""
    finalists: int = 3
    """How many of the best configurations are confirmed, beside the defaults."""
    cores_per_trial: int = 0
    """CPU cores of a trial; on a CPU, 0 takes one core, or an eighth of the cores where there are more than eight."""
    sampler: Literal["tpe", "gp", "qmc", "random"] = "tpe"
    """How the next values are chosen: Optuna's Parzen estimators, Gaussian process, quasi-random, random."""
    pruner: Literal["halving", "hyperband", "median", "none"] = "halving"
    """How hopeless trials are ended early, by their AP after equal seconds (Optuna's pruners)."""
    storage: str = ""
    """Where the study is kept: an Optuna storage URL that several machines may share; empty takes a file of its own."""
