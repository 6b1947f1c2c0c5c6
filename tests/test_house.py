"""Tests of the house itself: what the linters cannot say about imports, pins and documents."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TORCH_FREE = (
    "paceline",
    "paceline.cli.main",
    "paceline.options",
    "paceline.records",
    "paceline.letterbox",
    "paceline.data.check",
    "paceline.data.shapes",
    "paceline.data.pack.remote",
    "paceline.data.convert.conversion",
    "paceline.models.catalogue",
    "paceline.planning.comparison",
)


def modules_named(path: Path) -> set[str]:
    """Every module that the file imports, and every dotted name that it spells out."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            named.add(ast.unparse(node))
    return named


def test_only_parallel_names_torch_distributed() -> None:
    naming = [path for path in SOURCES if any(name.startswith("torch.distributed") for name in modules_named(path))]
    assert [path for path in naming if path.parent.name != "parallel"] == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_these_modules_do_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_on_one_device_loads_nothing_that_only_others_need() -> None:
    """Each of these takes from a fifth of a second to more than one, between the start and the first step."""
    heavy = ("torch.distributed.pipelining", "torch.distributed.tensor", "matplotlib", "faster_coco_eval")
    code = f"import sys, paceline.commands.train; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [
        entry for entries in project["optional-dependencies"].values() for entry in entries
    ]
    names = {re.split(r"[\[<>=!~ ]", entry)[0] for entry in wanted} - {"paceline"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    plain = {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    assert {name for name in names if re.sub(r"[-_.]+", "-", name).lower() not in plain} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_every_decision_is_listed() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    pages = [path.name for path in (ROOT / "docs/decisions").glob("0*.md")]
    assert pages
    assert [name for name in pages if f"({name})" not in index] == []


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    """Nobody writes a figure by hand."""
    script = ROOT / "bench" / "readme_table.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
