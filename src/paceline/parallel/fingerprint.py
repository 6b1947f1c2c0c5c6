"""The fingerprint of a run: what must be the same on all ranks, compared at the start."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from paceline.errors import UserError
from paceline.parallel.store import value_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch._C._distributed_c10d import Store

    from paceline.parallel.rank import Rank

_MOST_NAMED = 8


def digest_of_package() -> str:
    """Hash the sources of this package, and the versions of what computes."""
    folder = Path(__file__).parents[1]
    state = hashlib.blake2b(f"torch {torch.__version__}".encode(), digest_size=16)
    for path in sorted(folder.rglob("*.py")):
        state.update(path.relative_to(folder).as_posix().encode() + b"\0")
        state.update(hashlib.blake2b(path.read_bytes(), digest_size=16).digest())
    return state.hexdigest()


def digest_of(values: Mapping[str, object]) -> str:
    """Hash settings; their order does not matter."""
    text = json.dumps(sorted(values.items()), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def compare(store: Store, rank: Rank, name: str, items: Mapping[str, str], *, limit_s: float) -> None:
    """Compare `items` over all ranks; rank 0 does it, and all raise the same UserError where something differs."""
    own = json.dumps({"host": rank.host, "items": dict(items)})
    store.set(f"agree/{name}/{rank.rank}", own)
    answer = f"agree/{name}/answer"
    if rank.rank == 0:
        keys = [f"agree/{name}/{other}" for other in range(rank.world)]
        entries = [json.loads(value_of(store, key, limit_s=limit_s, option="limit_start")) for key in keys]
        store.set(answer, difference([(entry["host"], entry["items"]) for entry in entries]))
    sentence = value_of(store, answer, limit_s=limit_s, option="limit_start")
    if sentence:
        raise UserError(sentence)


def difference(entries: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Say what differs between ranks (host, items), in the order of the ranks; empty where nothing does.

    The ranks that are named are those that differ from what most have, or from rank 0 where no value has a majority.
    """
    parts = []
    for key in entries[0][1]:
        values = [items.get(key, "") for _, items in entries]
        if len(set(values)) == 1:
            continue
        (common, count), *_ = Counter(values).most_common()
        reference = common if 2 * count > len(values) else values[0]
        others = [f"{number} on {host}" for number, (host, _) in enumerate(entries) if values[number] != reference]
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        plural = "ranks" if len(others) > 1 else "rank"
        parts.append(f"{key} ({plural} {', '.join(others[:_MOST_NAMED])}{more})")
    if not parts:
        return ""
    return f"Not all ranks have the same {' and '.join(parts)}; make them the same on every host and start again."
