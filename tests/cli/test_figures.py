"""The figures of an evaluation as they are printed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from paceline.cli.main import main
from paceline.records import ClassRecord, EvaluationRecord

CLASSES = tuple(
    ClassRecord(name=name, num_boxes=3, num_images=2, ap=0.5, ap50=0.75, precision=0.5, recall=0.25, f1=0.3)
    for name in ("cat", "[dog]")
)
RECORD = EvaluationRecord(
    ap=0.5, ap50=0.75, ap75=0.5, ap_small=-1, ap_medium=0.5, ap_large=0.5, ar1=0, ar10=0, ar100=0, ar_small=0,
    ar_medium=0, ar_large=0, precision=0.5, recall=0.25, f1=0.3, threshold=0.4, num_images=3, num_boxes=6,
    per_class=CLASSES,
)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "rows"), [([], ["all", "cat", "[dog]"]), (["verbose=False"], ["all"]), (["--no-verbose"], ["all"])]
)
def test_verbose_false_leaves_out_the_figures_of_each_class(
    words: list[str], rows: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("paceline.commands.val.validate", lambda options: SimpleNamespace(record=RECORD))
    assert main(["val", "model=x", *words]) == 0
    header, *table = capsys.readouterr().out.split("AP75")[0].splitlines()
    assert header.split()[0] == "class"
    assert [line.split()[0] for line in table] == rows
