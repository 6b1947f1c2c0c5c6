"""Memory of plans: how fast each way of taking a step was, for a machine, a model, a size and a batch.

One JSON file per key in the package's cache folder. A file that is torn, of another version or of another key is as
good as none; two runs that write at once leave one whole file of either.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from paceline.errors import UserError
from paceline.records import write_atomically
from paceline.training.plan import StepPlan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

log = logging.getLogger("paceline")

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A plan and its speed."""

    plan: StepPlan
    ms: float
    """Least milliseconds of a step; infinite where it was not possible."""
    compile_s: float = 0.0
    """Seconds that went into compilation."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """All that was measured for one key."""

    entries: tuple[Measured, ...]
    """The best first; compiled plans last."""
    images: int
    """In each step."""
    date: str = field(default_factory=lambda: datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"))


@dataclass(frozen=True, kw_only=True)
class PlanMemory:
    """Files of one key each."""

    folder: Path

    def file(self, key: Mapping[str, Any]) -> Path:
        """Where what is known of a key is, or would be."""
        text = json.dumps(key, sort_keys=True, allow_nan=False)
        return self.folder / f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.json"

    def recall(self, key: Mapping[str, Any]) -> Measurement | None:
        """Return what was measured for exactly this key; None where nothing usable is kept."""
        try:
            content = json.loads(self.file(key).read_text(encoding="utf-8"))
            if content["format"] != FORMAT or content["key"] != json.loads(json.dumps(key)):
                return None
            return _from_json(content["measured"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def keep(self, key: Mapping[str, Any], measurement: Measurement) -> None:
        """Write what was measured; where that is not possible, the next run measures again."""
        content = {"format": FORMAT, "key": dict(key), "measured": _to_json(measurement)}
        try:
            write_atomically(self.file(key), json.dumps(content, indent=1, allow_nan=False).encode())
        except UserError as error:
            log.info("The measurement of the step is not kept. %s", error)


def _to_json(measurement: Measurement) -> dict[str, Any]:
    values = asdict(measurement)
    for entry in values["entries"]:
        entry["ms"] = entry["ms"] if math.isfinite(entry["ms"]) else None
    return values


def _from_json(values: dict[str, Any]) -> Measurement:
    entries = tuple(
        Measured(
            plan=StepPlan.from_json(entry["plan"]),
            ms=math.inf if entry["ms"] is None else float(entry["ms"]),
            compile_s=float(entry["compile_s"]),
        )
        for entry in values["entries"]
    )
    if not entries or any(not entry.ms > 0 or not math.isfinite(entry.compile_s) for entry in entries):
        raise ValueError("no measurement")
    return Measurement(entries=entries, images=int(values["images"]), date=str(values["date"]))
