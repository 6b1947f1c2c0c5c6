"""What was measured before: records in one file, each found again by device, versions and task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def key_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return what has to be equal for a result to be taken for this one."""
    return {
        "device": record["machine"]["device"],
        "model": record["model"],
        "imgsz": record["options"]["imgsz"],
        "batch": record["options"]["batch"],
        "versions": record["machine"]["versions"],
    }


def read_results(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file; none where there is no such file."""
    return json.loads(file.read_text(encoding="utf-8"))["records"] if file.exists() else []


def merge(file: Path, record: dict[str, Any], key: Callable[[dict[str, Any]], dict[str, Any]] = key_of) -> None:
    """Put a record among the others, in the place of an older one of the same key; never leaves half a file."""
    others = [other for other in read_results(file) if key(other) != key(record)]
    content = {"records": sorted([*others, record], key=lambda entry: json.dumps(key(entry)))}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def here(device: str) -> dict[str, Any]:
    """Device and versions, as a bench of this machine would name them; asked of a process of its own."""
    code = (
        "import json, sys; from paceline.commands.device import resolve_device; from paceline.planning.machine import "
        "machine_of; m = machine_of(resolve_device(sys.argv[1])); print(json.dumps([m.device, m.versions]))"
    )
    done = subprocess.run([sys.executable, "-c", code, device], check=True, capture_output=True, text=True)
    name, versions = json.loads(done.stdout.splitlines()[-1])
    return {"device": name, "versions": versions}
