"""Folder of a search: found again when it is resumed, made or cleared when one begins."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.errors import UserError
from paceline.records import RunFolder, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TypeVar

    T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SearchFolder:
    """Where a search keeps what it has; `paceline.commands.tune` shows the files."""

    path: Path

    @property
    def config(self) -> Path:
        """Every option of the search; its `name` is that of the study, whatever the folder is called by now."""
        return self.path / "config.yaml"

    @property
    def space(self) -> Path:
        """What is searched. It is written last, so a folder that has it can be resumed."""
        return self.path / "space.yaml"

    @property
    def database(self) -> Path:
        """The study, unless it is kept elsewhere."""
        return self.path / "study.db"

    @property
    def trials(self) -> Path:
        """Run folders of the trials."""
        return self.path / "trials"

    @property
    def is_search(self) -> bool:
        """Whether a search has begun here."""
        return self.space.is_file()

    def holds_space(self, file: Path) -> bool:
        """Whether a file says what this search was started with."""
        try:
            return file.read_text(encoding="utf-8") == self.space.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return False

    @classmethod
    def latest(cls, project: Path) -> SearchFolder:
        """Find the search that began last. Raises UserError where there is none."""
        found = sorted(project.glob("*/space.yaml"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"There is no search to resume in {project}; name one: --resume runs/tune.")
        return cls(path=found[-1].parent)

    @classmethod
    def begin(
        cls, project: Path, name: str, *, exist_ok: bool, shared: bool, study: Callable[[SearchFolder], T]
    ) -> tuple[SearchFolder, T]:
        """Make a folder, or clear that of an earlier search, for the study that `study` opens.

        What was there stays as it was, and nothing is left, where `study` refuses. A study that is `shared` lies
        outside of the folder.
        """
        named = project / name if name else None
        if named is not None and exist_ok and named.is_dir() and any(named.iterdir()):
            found = cls(path=RunFolder.create(project, name, exist_ok=True, default_name="tune").path)
            if not shared:
                found.database.unlink(missing_ok=True)
            opened = study(found)
            found._clear()
            return found, opened
        was_there, had_project = named is not None and named.is_dir(), project.is_dir()
        found = cls(path=RunFolder.create(project, name, exist_ok=exist_ok, default_name="tune").path)
        try:
            opened = study(found)
        except BaseException:
            shutil.rmtree(found.path, ignore_errors=True)
            if was_there:
                found.path.mkdir(exist_ok=True)
            elif not had_project:
                with contextlib.suppress(OSError):  # another run has come
                    project.rmdir()
            raise
        found._clear()
        return found, opened

    def _clear(self) -> None:
        for old in (self.space, self.path / "confirm.jsonl", self.path / "best.yaml", self.path / "report.html"):
            old.unlink(missing_ok=True)
        shutil.rmtree(self.trials, ignore_errors=True)
        self.trials.mkdir(exist_ok=True)

    def describe(self, options: str, space: str) -> None:
        """Write the options, and last the space, both as YAML."""
        write_atomically(self.config, options.encode())
        write_atomically(self.space, space.encode())
