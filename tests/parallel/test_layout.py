"""Laws of the layout: what is possible uses every device, what is not is refused with the nearest that is."""

from __future__ import annotations

from contextlib import suppress
from itertools import product

import pytest

from paceline.errors import UserError
from paceline.parallel.config import ParallelConfig
from paceline.parallel.layout import Layout

KINDS = ("auto", "data", "fsdp", "pipeline", "hybrid")


def of(*, devices: int, batch: int = 64, nodes: int = 23, **settings: object) -> Layout:
    return Layout.of(ParallelConfig(**settings), devices=devices, batch=batch, nodes=nodes)  # type: ignore[arg-type]


def test_every_layout_that_is_not_refused_uses_every_device_and_every_image() -> None:
    found = 0
    for kind, devices, stages, batch in product(KINDS, range(1, 13), range(7), (12, 24, 50)):
        with suppress(UserError):
            layout = of(devices=devices, batch=batch, parallel=kind, stages=stages)
            found += 1
            assert layout.devices == devices
            assert batch % (layout.replicas * layout.microbatches) == 0
            assert stages in (0, layout.pipeline)
            assert layout.pipeline == 1 or layout.microbatches >= layout.pipeline
            places = {(layout.replica_of(rank), layout.stage_of(rank)) for rank in range(devices)}
            assert places == set(product(range(layout.replicas), range(layout.pipeline)))
    assert found > 100


def test_one_device_and_nothing_asked_is_one_process() -> None:
    assert of(devices=1, batch=7) == Layout()


def test_what_is_left_open_is_decided() -> None:
    assert of(devices=4) == Layout(data=4)
    assert of(devices=4, stages=2) == Layout(data=2, pipeline=2, microbatches=8)
    assert of(devices=4, parallel="pipeline", batch=20) == Layout(pipeline=4, microbatches=10)
    assert of(devices=4, parallel="hybrid", microbatches=4) == Layout(data=2, pipeline=2, microbatches=4)
    assert of(devices=4, parallel="fsdp", bn="sync") == Layout(shard=4, norm_ranks=4)
    assert of(devices=8, bn="group:2", gradients="bf16") == Layout(data=8, norm_ranks=2, gradients="bf16")


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        ({"devices": 6, "stages": 4}, "stages=3 or stages=6"),
        ({"devices": 6, "parallel": "pipeline", "stages": 4}, "stages=6"),
        ({"devices": 8, "parallel": "hybrid", "stages": 8}, "stages=4"),
        ({"devices": 5, "parallel": "hybrid"}, "give 6"),
        ({"devices": 2, "parallel": "hybrid"}, "take pipeline or data"),
        ({"devices": 4, "batch": 10}, "batch=8 or 12"),
        ({"devices": 4, "batch": 3}, "batch=4"),
        ({"devices": 24, "parallel": "pipeline", "batch": 48}, "take 23 at most"),
        (
            {"devices": 2, "stages": 2, "microbatches": 3, "batch": 16},
            "microbatches=2 or microbatches=4, or batch=15 or 18",
        ),
        ({"devices": 2, "stages": 2, "microbatches": 1}, "take 2 or more"),
        ({"devices": 2, "stages": 2, "batch": 1}, "take batch=2 or more"),
        ({"devices": 2, "microbatches": 4}, "give stages=2"),
        ({"devices": 1, "stages": 2}, "give devices=2"),
        ({"devices": 1, "parallel": "fsdp"}, "give devices=2"),
        ({"devices": 2, "parallel": "data", "stages": 2}, "parallel=pipeline"),
        ({"devices": 6, "batch": 66, "bn": "group:4"}, "bn=group:3 or bn=group:6"),
        ({"devices": 2, "bn": "groups"}, "local, sync, or group:8"),
        ({"devices": 2, "bn": "group:0"}, "local, sync, or group:8"),
        ({"devices": 2, "parallel": "fsdp", "gradients": "bf16"}, "leave it out"),
        ({"devices": 1, "gradients": "bf16"}, "leave it out"),
    ],
)
def test_what_is_not_possible_is_refused_with_the_nearest_that_is(settings: dict[str, object], nearest: str) -> None:
    with pytest.raises(UserError) as refusal:
        of(**settings)  # type: ignore[arg-type]
    assert nearest in str(refusal.value)
