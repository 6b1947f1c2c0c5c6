"""The documents: their commands and calls are understood by the program, and their links lead to headings."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from paceline.cli.argv import sort_words
from paceline.cli.main import HELP
from paceline.keywords import BenchKeywords, PredictKeywords, TrainKeywords, TuneKeywords, ValKeywords
from paceline.options import (
    BenchOptions,
    DataCheckOptions,
    DataConvertOptions,
    DataPackOptions,
    DataPlotOptions,
    Options,
    PredictOptions,
    TrainOptions,
    TuneOptions,
    ValOptions,
    settle_resume,
)

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS: tuple[type[Options], ...] = (
    TrainOptions,
    ValOptions,
    PredictOptions,
    TuneOptions,
    BenchOptions,
    DataCheckOptions,
    DataPlotOptions,
    DataPackOptions,
    DataConvertOptions,
)
COMMANDS = {options.COMMAND: options for options in OPTIONS}
CALLS: dict[str, type] = {
    "train": TrainKeywords,
    "val": ValKeywords,
    "predict": PredictKeywords,
    "stream": PredictKeywords,
    "tune": TuneKeywords,
    "benchmark": BenchKeywords,
}
BESIDE = {"callbacks", "transform", "source"}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words behind `paceline` of each command of a page, in its shell blocks and between backquotes."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += [" ".join(line.split()) for line in re.findall(r"`(paceline [^`]+)`", prose(page))]
    found = []
    for line in lines:
        words = [word for word in shlex.split(line, comments=True) if word != "..."]
        if "paceline" in words and "|" not in line and "pip" not in words:
            found.append(words[words.index("paceline") + 1 :])
    return found


def understand(words: list[str]) -> None:
    """Read a command's options as the program does; raises UserError for any that is wrong."""
    if words[0] == "models" or "COMMAND" in words:
        return
    name = " ".join(words[:2]) if words[0] == "data" else words[0]
    command = COMMANDS[name]
    given = sort_words(command, words[len(name.split()) :]).options
    command.from_flat(settle_resume(given) if command is TrainOptions else given)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_of_the_pages_are_understood(page: Path) -> None:
    for words in commands(page):
        understand(words)


def test_the_pages_have_commands_of_every_kind() -> None:
    """So that the test above has something to find."""
    names = {words[0] for page in PAGES for words in commands(page)}
    assert names >= {"train", "val", "predict", "tune", "bench", "data", "models"}


def test_examples_of_the_help_are_understood() -> None:
    examples = [line.split()[1:] for line in HELP.splitlines() if line.startswith("  paceline ")]
    assert len(examples) > 5
    for words in examples:
        understand(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_calls_of_the_pages_name_options_that_exist(page: Path) -> None:
    inline = re.findall(r"`(YOLO\([^`]+)`", prose(page))
    for text in [*blocks(page, "python"), *inline]:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
                known = set(CALLS[node.func.attr].__annotations__) | BESIDE
                assert {keyword.arg for keyword in node.keywords} <= known, ast.unparse(node)


_SMALL = (
    (r"epochs=\d+", "epochs=1, imgsz=32, batch=4, workers=1, device='cpu', tune_step='off'"),
    (r"(?<!epochs=1), imgsz=640", ""),
    (r'data="[a-z.]+"', 'data="d.yaml"'),
    (r"conf=0\.4", "conf=0.0"),
)


@pytest.mark.slow
def test_python_of_the_first_pages_runs(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, on a small set: in one folder, one after the other."""
    content = yaml.safe_load(squares.read_text(encoding="utf-8"))
    content |= {"path": str(squares.parent), "test": content["val"]}
    (tmp_path / "d.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (tmp_path / "photos").mkdir()
    for source in (squares.parent / "images" / "val").iterdir():
        shutil.copy(source, tmp_path / "photos")
    shutil.copy(next((tmp_path / "photos").iterdir()), tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    tables: list[list[object]] = []
    written = SimpleNamespace(to_csv=lambda name: Path(name).touch())
    pandas = SimpleNamespace(json_normalize=lambda rows: tables.append(rows) or written)
    monkeypatch.setitem(sys.modules, "pandas", pandas)  # type: ignore[arg-type]
    for page in (ROOT / "README.md", ROOT / "docs" / "from_ultralytics.md"):
        for text in blocks(page, "python"):
            for pattern, instead in _SMALL:
                text = re.sub(pattern, instead, text)
            exec(compile(text, page.name, "exec"), {"__name__": "__main__"})
    assert len(tables[0]) == 1
    assert {path.name for path in tmp_path.iterdir()} >= {"found.jpg", "with_boxes.jpg", "results.csv", "runs"}


def headings(page: Path) -> set[str]:
    """The anchors of a page, as they are made of its headings where it is shown."""
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"(?m)^#+ (.+)$", prose(page))]
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_to_headings_lead_to_one(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        if anchor and "://" not in target and other.suffix == ".md":
            assert anchor in headings(other), target


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name != "index.md" and f"({page.name})" not in index] == []


def test_benches_that_the_readme_names_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = set(re.findall(r"make bench-([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert names
    for name in names:
        scripts = [ROOT / "bench" / name / file for file in ("run.py", "bench.py")]
        assert f"\nbench-{name}:" in makefile or any(script.exists() for script in scripts), name
