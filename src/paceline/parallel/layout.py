"""The layout: how many copies, shards and stages the devices make up. Numbers only, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from paceline.errors import UserError

if TYPE_CHECKING:
    from paceline.parallel.config import ParallelConfig

MICROBATCHES_PER_STAGE = 4
"""What `microbatches=0` aims at: the stages then wait for 1/(1 + 4) of the time at most."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """data x shard x pipeline devices.

    ```
                  stage 0   stage 1
    replica 0     rank 0    rank 1        data=2 (or shard=2), pipeline=2:
    replica 1     rank 2    rank 3        neighbours in a pipeline are neighbours in rank
    ```
    """

    data: int = 1
    """Copies of the network, each with a share of the batch."""
    shard: int = 1
    """Devices that share out the parameters of one copy, each with a share of the batch."""
    pipeline: int = 1
    """Stages that each copy is cut into."""
    microbatches: int = 1
    """Parts in which a replica's share of the batch goes through the stages."""
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    norm_ranks: int = 1
    """Neighbouring replicas whose batch norms normalise together."""
    gradients: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        assert min(self.data, self.shard, self.pipeline, self.microbatches, self.norm_ranks) >= 1
        assert self.shard == 1 or (self.data == 1 and self.pipeline == 1)
        assert self.replicas % self.norm_ranks == 0
        assert self.microbatches == 1 or self.pipeline > 1

    @property
    def devices(self) -> int:
        """Number of devices, which is the number of ranks."""
        return self.data * self.shard * self.pipeline

    @property
    def replicas(self) -> int:
        """Number of shares that each batch is divided into."""
        return self.data * self.shard

    def replica_of(self, rank: int) -> int:
        """Which share of each batch a rank sees."""
        return rank // self.pipeline

    def stage_of(self, rank: int) -> int:
        """Which stage a rank holds."""
        return rank % self.pipeline

    def __str__(self) -> str:
        if self.devices == 1:
            return "one device"
        kind = "sharded copies" if self.shard > 1 else "copies"
        copies = f"{self.replicas} {kind}" if self.replicas > 1 else ""
        stages = f"{self.pipeline} stages, {self.microbatches} micro-batches ({self.schedule})"
        return ", ".join(part for part in (copies, stages if self.pipeline > 1 else "") if part)

    @classmethod
    def of(cls, config: ParallelConfig, *, devices: int, batch: int, nodes: int) -> Layout:
        """Decide what the options leave open.

        devices: how many there are. batch: images per step over all of them. nodes: of the network's graph.
        Raises UserError for what is not possible, and names the nearest that is.
        """
        assert devices >= 1
        stages = _stages(config, devices, nodes)
        replicas = devices // stages
        _check_batch(batch, replicas)
        return cls(
            data=1 if config.parallel == "fsdp" else replicas,
            shard=replicas if config.parallel == "fsdp" else 1,
            pipeline=stages,
            microbatches=_microbatches(config, stages, replicas, batch),
            schedule=config.schedule,
            norm_ranks=_norm_ranks(config.bn, replicas),
            gradients=_gradients(config, replicas),
        )


def _stages(config: ParallelConfig, devices: int, nodes: int) -> int:
    """Check the number of stages against the kind, the devices and the network."""
    kind, asked = config.parallel, config.stages
    if kind in {"data", "fsdp"} or (kind == "auto" and asked <= 1):
        if asked > 1:
            raise UserError(f"parallel={kind} does not cut the network; leave stages out, or take parallel=pipeline.")
        if kind == "fsdp" and devices == 1:
            raise UserError("parallel=fsdp needs at least 2 devices to share the network out; give devices=2.")
        return 1
    if devices == 1:
        raise UserError(f"A network cut into stages needs at least 2 devices; give devices=2, or leave {kind} out.")
    if kind == "hybrid" and devices < 4:
        raise UserError(f"parallel=hybrid needs at least 4 devices, not {devices}; take pipeline or data.")
    stages = asked or (devices if kind == "pipeline" else 2)
    possible = _divisors(devices)
    if kind == "pipeline":
        possible = [devices]
    elif kind == "hybrid":
        possible = possible[1:-1]
    else:
        possible = possible[1:]
    if not possible:
        raise UserError(f"parallel=hybrid needs stages x copies devices, and {devices} is prime; give {devices + 1}.")
    if stages not in possible:
        nearest = " or ".join(f"stages={value}" for value in _nearest(stages, possible))
        raise UserError(
            f"stages={stages} does not fit {devices} devices under parallel={kind}: stages x copies has to be their "
            f"number; take {nearest}."
        )
    if stages > nodes:
        raise UserError(f"stages={stages} is more than the {nodes} nodes of the network; take {nodes} at most.")
    return stages


def _check_batch(batch: int, replicas: int) -> None:
    if batch % replicas == 0:
        return
    raise UserError(
        f"batch={batch} does not divide into {replicas} equal shares; take {_multiples_beside(batch, replicas)}."
    )


def _microbatches(config: ParallelConfig, stages: int, replicas: int, batch: int) -> int:
    asked = config.microbatches
    if stages == 1:
        if asked > 1:
            raise UserError(
                f"microbatches={asked} is for networks that are cut into stages; give stages=2, or leave it."
            )
        return 1
    share = batch // replicas
    possible = [number for number in _divisors(share) if number >= stages]
    if not possible:
        raise UserError(
            f"batch={batch} gives {share} images to each pipeline of {stages} stages, which needs {stages} "
            f"micro-batches at least; take batch={stages * replicas} or more."
        )
    if asked == 0:
        return max([number for number in possible if number <= MICROBATCHES_PER_STAGE * stages], default=possible[0])
    if asked < stages:
        raise UserError(
            f"microbatches={asked} leaves some of {stages} stages without work; take {possible[0]} or more."
        )
    if share % asked:
        nearest = " or ".join(f"microbatches={value}" for value in _nearest(asked, possible))
        raise UserError(
            f"microbatches={asked} does not divide the {share} images of each pipeline; take {nearest}, or "
            f"{_multiples_beside(batch, asked * replicas)}."
        )
    return asked


def _norm_ranks(text: str, replicas: int) -> int:
    word, _, number = text.strip().lower().partition(":")
    if word in {"local", "sync"} and not number:
        return replicas if word == "sync" else 1
    if word != "group" or not number.isdecimal() or int(number) < 1:
        raise UserError(f"bn={text!r} is not known; write local, sync, or group:8 for groups of eight copies.")
    asked = int(number)
    if replicas % asked:
        nearest = " or ".join(f"bn=group:{value}" for value in _nearest(asked, _divisors(replicas)))
        raise UserError(
            f"bn={text} does not divide {replicas} copies of the network into equal groups; take {nearest}."
        )
    return asked


def _gradients(config: ParallelConfig, replicas: int) -> Literal["fp32", "bf16"]:
    if config.gradients == "bf16" and (config.parallel == "fsdp" or replicas == 1):
        raise UserError("gradients=bf16 is for gradients that travel between copies of the network; leave it out.")
    return config.gradients


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _nearest(wanted: int, possible: list[int]) -> list[int]:
    """Return the next possible number below and the next above."""
    below = [value for value in possible if value < wanted][-1:]
    return below + [value for value in possible if value > wanted][:1]


def _multiples_beside(batch: int, factor: int) -> str:
    below = batch // factor * factor
    return f"batch={below} or {below + factor}" if below else f"batch={factor}"
