"""Compile cache: a folder of compiled code for one run, seeded from what an earlier run has kept.

```
kept file        checked by length and SHA-256, unpacked when a run opens ...
  -> folder      ... into a temporary folder of this process, which nobody else writes into and which ends with it
  -> kept file   packed, and put into the place of the old one by one rename, after a clean end with new code
```
So a process that is killed while it compiles leaves nothing behind that a later one would load. The file holds the
whole folder: what `torch.compiler.save_cache_artifacts` gives lacks the shared objects, and on a CPU these are most of
the time. Compiled code is run, so the file is used only if it belongs to this user and nobody else can write it.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import platform
import shutil
import stat
import subprocess
import tarfile
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from paceline.errors import UserError
from paceline.parallel.fingerprint import digest_of_package
from paceline.records import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

log = logging.getLogger("paceline")

_HEAD = b"paceline compile cache 1\n"
_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
MOST_BYTES = 1 << 30
"""A folder that grows beyond this is not kept."""


class CompileCache:
    """Opens for one run at a time."""

    def __init__(self, folder: Path, key: Mapping[str, Any], *, keeps: bool = True) -> None:
        """Name the file for a key, which should tell everything that compiled code hangs on.

        keeps: whether `save` writes; of several ranks, one should.
        """
        text = repr(sorted(key.items()))
        self.file = folder / f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.bin"
        self._keeps = keeps
        self.is_seeded = False
        """Whether there is code from an earlier run in the folder."""
        self._stack = ExitStack()
        self._folder: Path | None = None
        self._seeded_with: frozenset[str] = frozenset()

    def __enter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="paceline-compiled-")))
        before = {name: os.environ.get(name) for name in _VARIABLES}
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self._folder)
        os.environ["TRITON_CACHE_DIR"] = str(self._folder / "triton")
        self._stack.callback(_restore, before)
        _forget_loaded()
        self._seed()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        self._folder = None
        _forget_loaded()

    def drop(self) -> bool:
        """Remove what an earlier run has kept, here and on disk; says whether there was anything."""
        was_seeded, self.is_seeded = self.is_seeded, False
        if was_seeded and self._folder is not None:
            for entry in self._folder.iterdir():
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
            _forget_loaded()
            self._discard()
        self._seeded_with = frozenset()
        return was_seeded

    def save(self) -> None:
        """Keep the folder for later runs, if it has anything new; never raises."""
        if not self._keeps or self._folder is None or self._files() <= self._seeded_with:
            return
        try:
            content = pack(self._folder)
            if len(content) <= MOST_BYTES:
                write_atomically(self.file, content)
                self.file.chmod(0o600)
        except (OSError, tarfile.TarError, UserError) as error:
            log.info("Compiled code is not kept for the next run: %s", error)

    def _seed(self) -> None:
        assert self._folder is not None
        try:
            content = _read_own(self.file)
        except OSError:
            return
        try:
            unpack(content, self._folder)
        except (ValueError, OSError, tarfile.TarError):
            log.info("%s is torn, so the step is compiled anew.", self.file)
            for entry in self._folder.iterdir():
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
            self._discard()
            return
        self.is_seeded = True
        self._seeded_with = self._files()

    def _files(self) -> frozenset[str]:
        assert self._folder is not None
        return frozenset(str(path.relative_to(self._folder)) for path in _kept(self._folder))

    def _discard(self) -> None:
        try:
            self.file.unlink(missing_ok=True)
        except OSError as error:
            log.info("Cannot remove %s: %s", self.file, error)


def compiler_key() -> dict[str, str]:
    """Name what compiled code hangs on wherever it is used: processor, versions, threads, GPU and C++ compiler."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "paceline": digest_of_package(),
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "gpu": gpu,
        "compiler": _version_of_compiler(),
    }


def pack(folder: Path) -> bytes:
    """Put all files of a folder into bytes that `unpack` checks."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for path in _kept(folder):
            archive.add(path, arcname=str(path.relative_to(folder)), recursive=False)
    content = buffer.getvalue()
    return _HEAD + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def unpack(content: bytes, folder: Path) -> None:
    """Put the files back. Raises ValueError where the content is not what was packed."""
    checksum, _, packed = content.removeprefix(_HEAD).partition(b"\n")
    if not content.startswith(_HEAD) or hashlib.sha256(packed).hexdigest().encode() != checksum:
        raise ValueError("torn, or not a compile cache")
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
        archive.extractall(folder, filter="data")


def _kept(folder: Path) -> list[Path]:
    """Files to keep, in order; locks and what is half written are not."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.suffix not in {".lock", ".tmp"}
    )


def _read_own(file: Path) -> bytes:
    """Read a file of this user that nobody else can write. Raises OSError."""
    with file.open("rb") as stream:
        status = os.fstat(stream.fileno())
        foreign = hasattr(os, "getuid") and status.st_uid != os.getuid()
        if foreign or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{file} can be written by others")
        return stream.read()


def _version_of_compiler() -> str:
    command = os.environ.get("CXX") or "g++"
    try:
        done = subprocess.run([command, "-dumpfullversion", "-dumpversion"], capture_output=True, timeout=10, text=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return f"{command} {done.stdout.strip()}"


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _forget_loaded() -> None:
    """Let torch forget which files it has loaded, since the folder has changed; what is compiled stays usable."""
    from torch._inductor.utils import clear_caches

    clear_caches()
