"""`bench/step/session.py`: every part leaves what it has, whether it ends, fails or has to be cut off."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from types import ModuleType

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "step" / "session.py"
PRINTED = """\
collected 5 items

tests/gpu/test_norms.py::test_one PASSED    [ 20%]
tests/gpu/test_norms.py::test_two[a b-1] FAILED [ 40%]
tests/gpu/test_norms.py::test_three SKIPPED (no CUDA device) [ 60%]
tests/gpu/test_norms.py::test_four ERROR    [ 80%]
"""


@pytest.fixture(name="session")
def _session(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("session_bench", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def run(session: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, codes: dict[str, str], *words: str) -> Any:
    """Run parts that are lines of Python."""
    parts = tuple(
        session.Part(name=name, words=(sys.executable, "-c", code), limit_s=20.0, needs_gpu=name == "kernels")
        for name, code in codes.items()
    )
    monkeypatch.setattr(session, "has_gpu", lambda device: False)
    monkeypatch.setattr(session, "parts_of", lambda arguments, *, on_gpu: parts)
    monkeypatch.setattr(sys, "argv", ["session.py", "--out", str(out), "--device", "cpu", *words])
    assert session.main() == 0
    return json.loads((out / "session.json").read_text())


def is_gone(number: int) -> bool:
    """Whether a process that was killed has ended, be it that nobody has asked how."""
    try:
        process = psutil.Process(number)
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(timeout=3)
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_each_part_leaves_its_result(
    session: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = {
        "tests": f"print('''{PRINTED}''')",
        "kernels": "print(1)",
        "run": "print('a table'); print('{\"ms\": 2.5}')",
        "joints": "print('half a table'); raise SystemExit(2)",
    }
    found = run(session, monkeypatch, tmp_path / "out", codes)
    assert found["tests"]["counts"] == {"ERROR": 1, "FAILED": 1, "PASSED": 1, "SKIPPED": 1}
    assert found["kernels"] == {"status": "needs a GPU"}
    assert found["run"]["result"] == {"ms": 2.5}
    assert (found["joints"]["status"], found["joints"]["last_lines"]) == (2, ["half a table"])
    printed = capsys.readouterr().out
    for name in ("test_two[a b-1]", "test_four"):
        assert f"failed: tests/gpu/test_norms.py::{name}" in printed
    assert json.loads(printed.splitlines()[-1])["joints"] == {"status": 2}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"session.json", "session.txt"}


def test_a_part_that_does_not_end_is_cut_off_with_all_that_it_has_started(
    session: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(child.pid, flush=True); print('tests/gpu/test_a.py::test_long', end=' ', flush=True); child.wait()"
    )
    begun = time.monotonic()
    found = run(session, monkeypatch, tmp_path, {"tests": code, "run": "print(1)"}, "--limit", "12")
    assert time.monotonic() - begun < 30
    assert found["tests"]["status"] == "cut off"
    assert found["tests"]["unfinished"] == ["tests/gpu/test_a.py::test_long"]
    assert found["run"] == {"status": "no time left"}
    assert is_gone(int((tmp_path / "session.txt").read_text().splitlines()[1].split()[0]))


def test_parts_name_scripts_that_are_there(session: ModuleType, tmp_path: Path) -> None:
    arguments = session.argparse.Namespace(out=tmp_path, data=tmp_path, device="auto", peer_python=tmp_path)
    parts = session.parts_of(arguments, on_gpu=True)
    assert [part.name for part in parts] == [
        "tests",
        "kernels",
        "compare",
        "run",
        "peers",
        "sizes",
        "render",
        "joints",
        "narrow",
    ]
    scripts = [Path(word) for part in parts for word in part.words if word.endswith(".py")]
    assert len(scripts) == 8
    assert all(script.exists() for script in scripts)
    arguments.peer_python = None
    assert "peers" not in [part.name for part in session.parts_of(arguments, on_gpu=True)]
    assert (SCRIPT.parents[2] / "tests" / "gpu").is_dir()
