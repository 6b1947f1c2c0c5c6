"""`paceline tune`: a search for hyper-parameters over ordinary runs, put together.

runs/tune/
  config.yaml      every option of the search
  space.yaml       what is searched
  study.db         the trials (unless `storage` names another place)
  trials/00000/    the run folder of each trial, 00000 being the defaults; 00007-seed1 are runs that confirm
  confirm.jsonl    results of those
  best.yaml        the answer: `paceline train --config` takes it
  report.html      the page
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import statistics
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from paceline.addresses import shown
from paceline.commands.tune_answer import Answer, TuneResult, why_none
from paceline.commands.weights import require_model
from paceline.data.dataset import open_data_set
from paceline.errors import UserError
from paceline.option_values import AUTO_BATCH, typed
from paceline.options import TrainOptions, TuneOptions, option_fields
from paceline.records import write_atomically
from paceline.training.budget import parse_duration
from paceline.tuning.folder import SearchFolder
from paceline.tuning.outcome import Objective
from paceline.tuning.search import Row, Search
from paceline.tuning.slots import divide
from paceline.tuning.sources import Confirmation, Confirmed, Finalist, Trials
from paceline.tuning.space import SearchSpace, default_space_text, read_space
from paceline.tuning.study import DEFAULTS, ROLE, SECONDS, Study

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from paceline.data.dataset import DataSet
    from paceline.data.index import Index
    from paceline.tuning.slots import Slot
    from paceline.tuning.space import Value

log = logging.getLogger("paceline")

_MAY_CHANGE = frozenset(
    {"trials", "time", "confirm", "finalists", "device", "cores_per_trial", "workers", "resume", "project"}
)
"""Options that a resumed search takes anew; the others decide what its trials mean."""
_SEARCHED_ROOMS = ("augment", "loss", "optim")
"""Rooms of a run whose options may be searched; the others would change the measure itself."""


def settle_tune(mapping: Mapping[str, object]) -> TuneOptions:
    """Turn flat options into those of a search; a resumed one keeps its own but for a few.

    Raises UserError for an option that resuming would ignore; one that says what the search has anyway may be given.
    """
    given = {name.replace("-", "_"): value for name, value in mapping.items()}
    options = TuneOptions.from_flat(given)
    if not options.loop.resume:
        return options
    folder = _resumed_folder(options)
    if folder is None:
        return options
    resumed = TuneOptions.read(folder.config)
    own, asked = resumed.to_flat(), TuneOptions.from_flat(given, base=resumed).to_flat()
    differing = {name for name in set(given) & set(own) - _MAY_CHANGE if asked[name] != own[name]}
    if options.tune.space and folder.holds_space(Path(options.tune.space)):
        differing.discard("space")
    elif options.tune.space:
        differing.add("space")  # also where the file has changed since
    if options.run.name and Path(options.run.name).name == folder.path.name:
        differing.discard("name")
    if differing:
        raise UserError(
            f"A resumed search keeps its own {', '.join(sorted(differing))}; leave "
            f"{'it' if len(differing) == 1 else 'them'} out, or start a new one. "
            f"It takes {', '.join(sorted(_MAY_CHANGE - {'resume', 'project'}))} anew."
        )
    anew = {name: value for name, value in given.items() if name in _MAY_CHANGE}
    return TuneOptions.from_flat({**anew, "resume": str(folder.path)}, base=resumed)


def tune(options: TuneOptions, show: Callable[[Row], None]) -> TuneResult:
    """Search as the options say; `show` is told of every change of a trial.

    Raises UserError for whatever the user can mend, before anything is written.
    """
    return _Tuning(options).run(show)


class _Tuning:
    """One search being put together."""

    def __init__(self, options: TuneOptions) -> None:
        _require_optuna()
        self._resumed = _resumed_folder(options) if options.loop.resume else None
        config = options.tune
        if not config.trials and not options.loop.time:
            raise UserError("A search needs an end: pass trials=50, or time=2h, or both.")
        if not options.loop.val:
            raise UserError("A search measures by the evaluations of its trials; leave val=False out.")
        if options.data.batch == AUTO_BATCH:
            raise UserError(
                "A search compares trials of one batch, which each would measure anew beside the others; run `paceline "
                "train batch=auto` once, and give the number that it says."
            )
        if options.ranks.devices > 1:
            raise UserError("A trial has one device; name the devices that run trials side by side: device=0,1.")
        require_model(options.model)
        self._limit_s = parse_duration(options.loop.time) if options.loop.time else None
        self._objective = Objective.parse(config.objective)
        self._slots = _slots(options)
        data_set = open_data_set(options.data, seed=options.loop.seed)
        self._options = options
        self._base = _concrete(options, data_set)
        self._space = _space(options, self._resumed)
        file = self._resumed.space if self._resumed else Path(config.space) if config.space else None
        self._space_text = file.read_text(encoding="utf-8") if file else default_space_text()
        self._space.require(self._defaults())
        assert data_set.train is not None
        assert data_set.val is not None
        self._identity = {
            "data set": f"{Path(shown(options.data.data)).name} {_fingerprint(data_set.train, data_set.val)}",
            "model": options.model,
            "image size": str(options.data.imgsz),
            "number of epochs": str(options.loop.epochs),
            "objective": str(self._objective),
        }

    def run(self, show: Callable[[Row], None]) -> TuneResult:
        """Search, confirm, write the answer and the page."""
        until = None if self._limit_s is None else time.monotonic() + self._limit_s
        opened, study = self._open()
        folder = opened.path
        search = Search(
            slots=self._slots,
            command=[sys.executable, "-m", "paceline.commands.trial"],
            base=self._base_of_trials(),
            folder=opened.trials,
            objective=self._objective,
            show=show,
        )
        log.info("Searching %s in %s, %d trials at a time.", ", ".join(self._space.entries), folder, len(self._slots))
        seeds = self._options.tune.confirm
        if self._limit_s is not None and seeds:
            log.info("time=%s is for the search; confirm=%d comes after it.", self._options.loop.time, seeds)
        trials = Trials(study, most=self._options.tune.trials, runs=opened.trials, objective=self._objective)
        confirmed: list[Confirmed] = []
        try:
            search.run(trials, until=until)
            confirmed = self._confirm(search, study, folder)
        finally:
            answer = Answer(
                study=study,
                folder=folder,
                objective=self._objective,
                base=self._base,
                title=f"Search of {folder.name}: {self._options.model} on {shown(self._options.data.data)}",
                confirmed=confirmed,
            )
            result = answer.write()
        if result is None:
            raise UserError(f"None of the trials ended well; {why_none(study)}{folder / 'report.html'} lists them.")
        return result

    def _open(self) -> tuple[SearchFolder, Study]:
        """Open or make the study, and only then write the folder: nothing has changed where the study is refused."""
        if self._resumed is not None:
            study = self._study(self._resumed)
            write_atomically(self._resumed.config, self._stored(self._name_of_study(self._resumed)).encode())
            return self._resumed, study
        run = self._options.run
        folder, study = SearchFolder.begin(
            run.project,
            run.name or (self._options.loop.resume if self._options.tune.storage else ""),
            exist_ok=run.exist_ok,
            shared=bool(self._options.tune.storage),
            study=self._study,
        )
        folder.describe(self._stored(self._name_of_study(folder)), self._space_text)
        return folder, study

    def _stored(self, name: str) -> str:
        loop = dataclasses.replace(self._options.loop, resume="")
        run = dataclasses.replace(self._options.run, name=name)
        return dataclasses.replace(self._options, loop=loop, run=run).to_yaml()

    def _name_of_study(self, folder: SearchFolder) -> str:
        """Name under which the study is kept: another than the folder's where that was renamed, or joined by name."""
        if self._resumed is not None:
            return Path(self._options.run.name).name or folder.path.name
        return self._options.loop.resume or folder.path.name

    def _study(self, folder: SearchFolder) -> Study:
        config, seed = self._options.tune, self._options.loop.seed
        storage = config.storage or f"sqlite:///{folder.database.resolve()}"
        name = self._name_of_study(folder)
        if self._options.loop.resume:
            recover = Trials.recoverer(folder.trials, self._objective)
            return Study.resume(
                storage, name, self._space, config, identity=self._identity, seed=seed + os.getpid(), recover=recover
            )
        return Study.create(
            storage, name, self._space, config, identity=self._identity, defaults=self._defaults(), seed=seed
        )

    def _defaults(self) -> dict[str, Value]:
        return {name: self._base[name] for name in self._space.entries}

    def _base_of_trials(self) -> dict[str, Any]:
        limit = "" if self._objective.within_s is None else f"{self._objective.within_s:g}s"
        shared = {"cache": "disk"} if self._base["cache"] == "auto" else {}  # one decoded set for all trials
        return self._base | {"plots": False, "save_period": -1, "time": limit, "resume": ""} | shared

    def _confirm(self, search: Search, study: Study, folder: Path) -> list[Confirmed]:
        """Train the best few, and the defaults, with other seeds, however long that takes."""
        count = self._options.tune.confirm
        best = study.best(self._options.tune.finalists)
        if not count or not best:
            return []
        defaults = study.defaults()
        if defaults is not None and defaults.number not in {trial.number for trial in best}:
            best.append(defaults)
        finalists = [
            Finalist(number=trial.number, values=dict(trial.params), is_defaults=trial.user_attrs.get(ROLE) == DEFAULTS)
            for trial in best
        ]
        first = self._options.loop.seed + 1
        confirmation = Confirmation(finalists, range(first, first + count), folder / "confirm.jsonl")
        rounds = math.ceil(confirmation.num_left / len(self._slots))
        each_s = statistics.fmean(float(trial.user_attrs.get(SECONDS, 0.0)) for trial in best)
        log.info(
            "Confirming %d configurations with %d other seeds each: %d runs, about %.0f minutes.",
            len(finalists),
            count,
            confirmation.num_left,
            math.ceil(rounds * each_s / 60.0),
        )
        search.run(confirmation)
        return confirmation.results()


def _concrete(options: TuneOptions, data_set: DataSet) -> dict[str, Any]:
    """Flat options of a run, with what `optimizer=auto` decides spelled out: it would not listen to a searched rate."""
    from paceline.training.recipe import Recipe

    assert data_set.train is not None
    training = options.training()
    plan = Recipe.of(
        training.optim,
        num_images=len(data_set.train),
        num_classes=len(data_set.names),
        batch=min(training.data.batch, len(data_set.train)),
        epochs=training.loop.epochs,
    ).plan
    if training.optim.optimizer == "auto":
        optim = dataclasses.replace(training.optim, optimizer=plan.name, lr0=plan.lr0, momentum=plan.momentum)
        training = dataclasses.replace(training, optim=optim)
    data = dataclasses.replace(training.data, data=_absolute(training.data.data))
    return yaml.safe_load(dataclasses.replace(training, data=data).to_yaml(whole=True))  # type: ignore[no-any-return]


def _absolute(data: str) -> str:
    """Path of a data set for a process that starts anywhere; names and addresses stay as they are."""
    path = Path(data).expanduser()
    return str(path.resolve()) if path.exists() and data != "shapes" else data


def _space(options: TuneOptions, resumed: SearchFolder | None) -> SearchSpace:
    known = option_fields(TrainOptions)
    searched = {name: entry.annotation for name, entry in known.items() if entry.room in _SEARCHED_ROOMS}
    types = {name: kind if isinstance(kind, type) else object for name, kind in searched.items()}

    def check(name: str, value: object) -> Value:
        entry = known[name]
        return typed(name, value, entry.annotation, entry.default)  # type: ignore[return-value]

    file = str(resumed.space) if resumed else options.tune.space
    return read_space(file, check, types)


def _slots(options: TuneOptions) -> list[Slot]:
    from paceline.commands.device import resolve_device

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    names = [word for word in options.loop.device.split(",") if word]
    devices = [resolve_device(name) for name in names]
    if len(set(devices)) < len(devices):
        raise UserError(f"device={options.loop.device} names a device twice; one trial runs on each device.")
    if any(device.type == "cpu" for device in devices) and len(devices) > 1:
        raise UserError(f"device={options.loop.device} mixes CPU and GPU; name GPUs, or cpu alone.")
    listed = ["cpu"] if devices[0].type == "cpu" else [str(device.index) for device in devices]
    return divide(listed, cores, options.tune.cores_per_trial)


def _fingerprint(*indexes: Index) -> str:
    value = 0
    for index in indexes:
        for array in (index.paths.blob, index.sizes, index.offsets, index.boxes, index.labels):
            value = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, value)
    return f"{value:08x}"


def _resumed_folder(options: TuneOptions) -> SearchFolder | None:
    """Find the folder of the search to go on with; None for one that this machine joins by its storage."""
    resume, run = options.loop.resume, options.run
    if resume == "true":
        return SearchFolder.latest(run.project)
    names = [resume, run.name] if run.name and options.tune.storage else [resume]
    for path in (Path(resume), *(run.project / name for name in names)):
        folder = SearchFolder(path=path.parent if path.suffix == ".db" else path)
        if folder.is_search:
            return folder
    if options.tune.storage:
        return None
    raise UserError(f"{resume} is no folder of a search; name one such as runs/tune, or its storage as well.")


def _require_optuna() -> None:
    try:
        import optuna
        import plotly
    except ImportError as error:
        raise UserError(f"A search needs {error.name}: pip install 'paceline[tune]'.") from error
    del optuna, plotly
