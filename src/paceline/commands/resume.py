"""Finding the run that `resume` names."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from paceline.addresses import shown
from paceline.data.source import SHAPES
from paceline.errors import UserError
from paceline.option_values import AUTO_BATCH
from paceline.options import RESUMED_ANEW, TrainOptions
from paceline.parallel.config import RanksConfig
from paceline.parallel.rank import rank_of_environment
from paceline.records import RunFolder

log = logging.getLogger("paceline")
ConfigT = TypeVar("ConfigT")


def going_on(options: TrainOptions, *, warns: bool = True) -> tuple[RunFolder | None, TrainOptions]:
    """Find the run that is to go on, and the options that it goes on with: its own, but for what was said anew.

    Without such a run, the folder is None and the options are as they were. Raises UserError where `resume` names
    nothing that can go on, or where the name of a new run is taken: this is asked before anything is read or started,
    and before the ranks meet, since the first of them makes the folder after that. warns: of options beside
    `resume=auto` that come to nothing.
    """
    folder = resumed_folder(options, warns=warns)
    if folder is None:
        if options.run.name:
            RunFolder.require_free(options.run.project, options.run.name, exist_ok=may_exist(options))
        return None, options
    stored = options_of(folder)
    data = _address(stored.data.data, options.data.data)
    if data and data != SHAPES and "://" not in data and not Path(data).expanduser().exists():
        raise UserError(
            f"The data of the run {folder.path}, {data}, are not there; go on from the folder that it was started in."
        )
    device, ranks = options.loop.device, options.ranks
    if device == TrainOptions().loop.device and ranks == RanksConfig():
        device = stored.loop.device
        ranks = stored.ranks if rank_of_environment() is None else ranks  # who starts the processes knows how many
    return folder, replace(
        stored,
        data=replace(stored.data, data=data),
        loop=replace(stored.loop, resume="", device=device),
        parallel=stored.parallel.relaid(options.parallel),
        ranks=ranks,
        limits=_said_anew(stored.limits, options.limits),
    )


def options_of(folder: RunFolder) -> TrainOptions:
    """Read a run's options; a data set that it named from another working folder is the one that it was trained on.

    Raises UserError where they cannot be read.
    """
    options = TrainOptions.read(folder.config)
    data = options.data.data
    path = Path(data).expanduser()
    if data == SHAPES or "://" in data or path.is_absolute():
        return options
    for record in folder.records("run"):
        trained_on = Path(record["data"])
        if trained_on.exists() and not (path.exists() and path.samefile(trained_on)):
            return replace(options, data=replace(options.data, data=record["data"]))
    return options


def may_exist(options: TrainOptions) -> bool:
    """Whether the folder of a run that starts may be there: also where `resume=auto` left nothing to go on from."""
    return options.run.exist_ok or options.loop.resume == "auto"


def _address(stored: str, asked: str) -> str:
    """Take another address of the same pack, with a new signature for instance. Raises UserError for another one."""
    if "://" not in asked:
        return stored
    if shown(asked) != shown(stored):
        raise UserError(f"A resumed run keeps its own data, {shown(stored)}; leave out data, or start a new run.")
    return asked


def _shown(value: object) -> object:
    """Return an option as it may be shown; addresses that differ in nothing else are the same."""
    return shown(value) if isinstance(value, str) else value


def _said_anew(stored: ConfigT, asked: ConfigT) -> ConfigT:
    """Take what was asked for where it is not the default."""
    defaults = type(asked)()
    values = {entry.name: getattr(asked, entry.name) for entry in fields(asked)}  # type: ignore[arg-type]
    changed = {name: value for name, value in values.items() if value != getattr(defaults, name)}
    return replace(stored, **changed)  # type: ignore[type-var]


def resumed_folder(options: TrainOptions, *, warns: bool = True) -> RunFolder | None:
    """Find the run that `resume` names: a folder, a file in its weights, `true` for the newest run, or `auto`."""
    resume = options.loop.resume
    if resume == "auto":
        return _begun_folder(options, warns=warns)
    if not resume:
        return None
    if resume == "true":
        project = options.run.project
        found = sorted(project.glob("*/weights/resume.safetensors"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"There is no run to resume in {project}; name one: resume=runs/train.")
        return _unfinished(RunFolder(path=found[-1].parents[1]))
    folder = _run_of(Path(resume))
    if not (folder / "weights" / "resume.safetensors").is_file():
        raise UserError(f"{folder} holds no weights/resume.safetensors, so it cannot be resumed; check the path.")
    return _unfinished(RunFolder(path=folder))


def _run_of(path: Path) -> Path:
    """Name the folder of the run that a path means: itself, its folder of weights, or a file there."""
    if (path / "resume.safetensors").is_file():
        return path.absolute().parent
    if path.suffix == ".pt" and not (path.parent / "resume.safetensors").is_file():
        raise UserError(f"{path} is a checkpoint of another trainer; name a run of Paceline, as in resume=runs/train.")
    is_file = path.suffix in {".safetensors", ".pt"} and len(path.absolute().parts) > 2
    return path.absolute().parents[1] if is_file else path


def _unfinished(folder: RunFolder) -> RunFolder:
    """Give back the folder of a run that has something left to do; raises UserError for another."""
    if folder.is_done:
        raise UserError(
            f"The run {folder.path} is done, so nothing is left to go on with; name another one, or train on from its "
            f"weights by model={folder.path}."
        )
    return folder


def _begun_folder(options: TrainOptions, *, warns: bool) -> RunFolder | None:
    """Find the named run if it has anything to go on from; None where it has to be started."""
    if not options.run.name:
        raise UserError("resume=auto needs the name of the run that it starts or goes on with; add name=...")
    folder = RunFolder(path=options.run.project / options.run.name)
    if folder.is_done:
        raise UserError(f"The run {folder.path} is done; choose another name for a new one.")
    if not (folder.weights / "resume.safetensors").is_file():
        return None
    before, now = TrainOptions.read(folder.config).to_flat(), options.to_flat()
    free = {"resume", "exist_ok"} | RESUMED_ANEW
    if options.data.batch == AUTO_BATCH:  # the folder has the number that was found, and the precision that it is for
        free |= {"batch", "amp"}
    changed = [name for name in now if name not in free and _shown(now[name]) != _shown(before[name])]
    if changed and warns:
        log.warning(
            "The run %s goes on with the options that it was started with, not with the new %s.",
            folder.path,
            ", ".join(changed),
        )
    return folder
