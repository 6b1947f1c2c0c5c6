"""Finding the run that `resume` names."""

from __future__ import annotations

import logging
from pathlib import Path

from paceline.errors import UserError
from paceline.option_values import AUTO_BATCH
from paceline.options import LAYOUT_OPTIONS, TrainOptions
from paceline.parallel.config import LimitsConfig
from paceline.records import RunFolder

log = logging.getLogger("paceline")


def resumed_folder(options: TrainOptions) -> RunFolder | None:
    """Find the run that `resume` names: a folder, a file in its weights, `true` for the newest run, or `auto`."""
    resume = options.loop.resume
    if resume == "auto":
        return _begun_folder(options)
    if not resume or resume.lower() in {"false", "no", "0"}:
        return None
    if resume.lower() in {"true", "yes", "1"}:
        project = options.run.project
        found = sorted(project.glob("*/weights/resume.safetensors"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"There is no run to resume in {project}; name one: resume=runs/train.")
        return RunFolder(path=found[-1].parents[1])
    path = Path(resume)
    folder = path.parents[1] if path.suffix == ".safetensors" and len(path.parts) > 2 else path
    if not (folder / "weights" / "resume.safetensors").is_file():
        raise UserError(f"{folder} holds no weights/resume.safetensors, so it cannot be resumed; check the path.")
    return RunFolder(path=folder)


def _begun_folder(options: TrainOptions) -> RunFolder | None:
    """Find the named run if it has anything to go on from; None where it has to be started."""
    if not options.run.name:
        raise UserError("resume=auto needs the name of the run that it starts or goes on with; add name=...")
    folder = RunFolder(path=options.run.project / options.run.name)
    if folder.is_done:
        raise UserError(f"The run {folder.path} is done; choose another name for a new one.")
    if not (folder.weights / "resume.safetensors").is_file():
        return None
    before, now = TrainOptions.read(folder.config).to_flat(), options.to_flat()
    free = {"resume", "device", "exist_ok"} | LAYOUT_OPTIONS | set(LimitsConfig.__dataclass_fields__)
    if options.data.batch == AUTO_BATCH:  # the folder has the number that was found
        free |= {"batch"}
    changed = [name for name in now if name not in free and now[name] != before[name]]
    if changed:
        log.warning(
            "The run %s goes on with the options that it was started with, not with the new %s.",
            folder.path,
            ", ".join(changed),
        )
    return folder
