"""What parallel training costs: efficiency of data, pipeline and hybrid on single cores, and what one DDP rank adds.

    python bench/parallel/run.py [--rounds 7] [--imgsz 192] [--model yolo11n]

Two processes, one core each, take turns at

    alone      each trains by itself, side by side with the other: the base, in which memory is contended as well
    data       both train one network, a copy on each, the same number of images per rank and step as alone
    pipeline   both train one network in two stages, 64 images in 8 micro-batches; alone, they are accumulated

Efficiency is images per second together over the sum of the two alone, in the same round; the median of the rounds
counts. Then four processes, two per core, do the same for a hybrid of 2 x 2. Then one process takes an update with
DDP (a world of 1) and one without, 30 times in turn. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.batch import Batch
from paceline.ledger import Ledger
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.parallel.build import Ranks
from paceline.parallel.data import DataEngine, Replicas
from paceline.parallel.layout import Layout
from paceline.parallel.norms import BatchStatistics
from paceline.parallel.single import SingleEngine
from paceline.training.config import OptimConfig
from paceline.training.ema import Ema
from paceline.training.optim import build_optimizer, plan_optimizer, update

RESULTS = Path(__file__).resolve().parents[1] / "results" / "parallel.json"
CLASSES, MICROBATCHES, MICROBATCH, DATA_BATCH = 20, 8, 8, 16
DEVICE = torch.device("cpu")


def random_batch(images: int, imgsz: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(images, 8, 2, generator=generator) * imgsz / 2
    boxes = torch.cat((corner, corner + imgsz / 8 + torch.rand(images, 8, 2, generator=generator) * imgsz / 4), dim=-1)
    shape = (images, 3, imgsz, imgsz)
    return Batch(
        images=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(
            memory_format=torch.channels_last
        ),
        boxes=boxes,
        labels=torch.randint(0, CLASSES, (images, 8), generator=generator),
        valid=torch.ones(images, 8, dtype=torch.bool),
        samples=torch.arange(images),
        original_hw=torch.full((images, 2), imgsz),
    )


class Trainer:
    """An engine with optimiser and moving average, and the batches that it accumulates for an update."""

    def __init__(self, engine: Any, batches: list[Batch]) -> None:
        self.engine = engine
        self.batches = batches
        plan = plan_optimizer(OptimConfig(), num_classes=CLASSES, updates=20_000, effective_batch=64)
        self.optimizer = build_optimizer(plan, engine.network, engine.parts.leaf)
        self.ema = Ema(engine.network, average=engine.parts.twin())
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4

    def step(self) -> None:
        """Take one update."""
        for number, batch in enumerate(self.batches, start=1):
            self.engine.accumulate(batch, completes=number == len(self.batches))
        update(self.optimizer, self.engine.gradient())
        self.ema.update()


def fresh(model: str) -> Any:
    torch.manual_seed(0)
    return build_model(model, CLASSES).to(memory_format=torch.channels_last).train()


def engine_settings() -> dict[str, Any]:
    return {"amp_dtype": None, "clip": 10.0, "ledger": Ledger(), "loss_scale": 1.0}


def criterion() -> DetectionLoss:
    return DetectionLoss(LossConfig(), CLASSES)


def laid_out(model: str, layout: Layout, batch: int, imgsz: int) -> Any:
    ranks = Ranks(layout, DEVICE)
    return ranks.engine(fresh(model), criterion(), batch=batch, imgsz=imgsz, **engine_settings())


def alone(model: str) -> SingleEngine:
    return SingleEngine(fresh(model), criterion(), **engine_settings())


def loopback_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[0])
    return 0


def timed(trainer: Trainer, steps: int, images: int) -> dict[str, float]:
    """Images per second of this rank's steps, with the share of the time that the process did not compute."""
    dist.barrier()
    sent, wall, busy = loopback_bytes(), time.perf_counter(), time.process_time()
    for _ in range(steps):
        trainer.step()
    seconds, cpu = time.perf_counter() - wall, time.process_time() - busy
    dist.barrier()
    return {
        "images_per_s": steps * images / seconds,
        "waiting_share": max(1 - cpu / seconds, 0.0),
        "loopback_bytes_per_step": (loopback_bytes() - sent) / steps,
    }


def rank_main(kind: str, rank: int, world: int, folder: Path, arguments: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % min(len(cores), 2)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
    model, imgsz = arguments.model, arguments.imgsz
    micro, whole = random_batch(MICROBATCH, imgsz), random_batch(MICROBATCH * MICROBATCHES, imgsz)
    share = random_batch(MICROBATCH * MICROBATCHES // 2, imgsz)
    images = MICROBATCH * MICROBATCHES
    if kind == "two":
        data = random_batch(DATA_BATCH, imgsz)
        trainers = {
            "alone, one batch": (Trainer(alone(model), [data]), 4, DATA_BATCH),
            "data": (Trainer(laid_out(model, Layout(data=2), 2 * DATA_BATCH, imgsz), [data]), 4, DATA_BATCH),
            "alone, accumulated": (Trainer(alone(model), [micro] * MICROBATCHES), 1, images),
            "pipeline": (
                Trainer(laid_out(model, Layout(pipeline=2, microbatches=MICROBATCHES), images, imgsz), [whole]),
                2,
                images / 2,
            ),
        }
    else:
        trainers = {
            "alone, accumulated": (Trainer(alone(model), [micro] * (MICROBATCHES // 2)), 1, images / 2),
            "hybrid": (
                Trainer(laid_out(model, Layout(data=2, pipeline=2, microbatches=4), images, imgsz), [share]),
                2,
                images / 4,
            ),
        }
    for trainer, _, _ in trainers.values():
        trainer.step()
    rounds = [
        {name: timed(trainer, steps, count) for name, (trainer, steps, count) in trainers.items()}
        for _ in range(arguments.rounds)
    ]
    (folder / f"rank{rank}.json").write_text(json.dumps(rounds))
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(kind: str, world: int, arguments: argparse.Namespace) -> list[list[dict[str, dict[str, float]]]]:
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, "--folder", name, "--kind", kind, "--world", str(world)]
        command += ["--rounds", str(arguments.rounds), "--imgsz", str(arguments.imgsz), "--model", arguments.model]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(world)]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            raise SystemExit(f"a rank of {kind} failed")
        return [json.loads((Path(name) / f"rank{rank}.json").read_text()) for rank in range(world)]


def summary(ranks: list[list[dict[str, dict[str, float]]]], kind: str, base: str) -> dict[str, Any]:
    """Efficiency of a kind over its base: median over the rounds of sums over the ranks."""

    def together(number: int, name: str) -> float:
        return sum(rank[number][name]["images_per_s"] for rank in ranks)

    numbers = range(len(ranks[0]))
    efficiencies = [together(number, kind) / together(number, base) for number in numbers]
    waiting = [rank[number][kind]["waiting_share"] for rank in ranks for number in numbers]
    return {
        "images_per_s": statistics.median(together(number, kind) for number in numbers),
        "alone_images_per_s": statistics.median(together(number, base) for number in numbers),
        "efficiency": statistics.median(efficiencies),
        "efficiencies": [round(value, 4) for value in efficiencies],
        "waiting_share": statistics.median(waiting),
        "loopback_bytes_per_step": statistics.median(
            rank[number][kind]["loopback_bytes_per_step"] for rank in ranks for number in numbers
        ),
    }


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def overhead_main(folder: Path, arguments: argparse.Namespace) -> None:
    """Take updates with and without DDP in turn, in one process on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    batch = random_batch(DATA_BATCH, arguments.imgsz)
    network = fresh(arguments.model)
    statistics_of_norms = BatchStatistics(network)
    wrapped = DataEngine(network, criterion(), Replicas(network, group), statistics_of_norms, **engine_settings())
    trainers = {"plain": Trainer(alone(arguments.model), [batch]), "ddp": Trainer(wrapped, [batch])}
    operations = {}
    for name, trainer in trainers.items():
        trainer.step()
        trainer.step()
        with _Counter() as counter:
            trainer.step()
        operations[name] = counter.count
    seconds: dict[str, list[float]] = {"plain": [], "ddp": []}
    for number in range(arguments.pairs):
        for name in ("plain", "ddp") if number % 2 == 0 else ("ddp", "plain"):
            start = time.perf_counter()
            trainers[name].step()
            seconds[name].append(time.perf_counter() - start)
    (folder / "overhead.json").write_text(json.dumps({"seconds": seconds, "operations": operations}))
    dist.destroy_process_group()


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, "--folder", name, "--kind", "overhead", "--pairs", str(arguments.pairs)]
        command += ["--imgsz", str(arguments.imgsz), "--model", arguments.model]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found = json.loads((Path(name) / "overhead.json").read_text())
    ratios = [
        math.log(ddp / plain) for plain, ddp in zip(found["seconds"]["plain"], found["seconds"]["ddp"], strict=True)
    ]
    mean = statistics.fmean(ratios)
    half = 2.045 * statistics.stdev(ratios) / math.sqrt(len(ratios))  # Student's t, 29 degrees of freedom
    operations = found["operations"]
    return {
        "pairs": len(ratios),
        "mean": math.exp(mean) - 1,
        "interval": [math.exp(mean - half) - 1, math.exp(mean + half) - 1],
        "median": math.exp(statistics.median(ratios)) - 1,
        "plain_s": statistics.median(found["seconds"]["plain"]),
        "operations": operations,
        "operations_added": operations["ddp"] - operations["plain"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--imgsz", type=int, default=192)
    parser.add_argument("--model", default="yolo11n")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind == "overhead":
        return overhead_main(arguments.folder, arguments)
    if arguments.kind:
        return rank_main(arguments.kind, arguments.rank, arguments.world, arguments.folder, arguments)

    start, load = time.perf_counter(), os.getloadavg()[0]
    two = run_ranks("two", 2, arguments)
    kinds = {
        "data x2": summary(two, "data", "alone, one batch"),
        "pipeline x2": summary(two, "pipeline", "alone, accumulated"),
        "hybrid 2x2, two ranks per core": summary(run_ranks("four", 4, arguments), "hybrid", "alone, accumulated"),
    }
    print(f"{'':32}{'images/s':>10}{'alone':>10}{'efficiency':>12}{'MB per step':>13}{'waiting':>9}")
    for name, kind in kinds.items():
        megabytes = kind["loopback_bytes_per_step"] / 1e6
        print(
            f"{name:32}{kind['images_per_s']:10.1f}{kind['alone_images_per_s']:10.1f}{kind['efficiency']:12.3f}"
            f"{megabytes:13.1f}{kind['waiting_share']:9.1%}"
        )
    ddp = overhead(arguments)
    print(
        f"DDP with a world of 1: {ddp['mean']:+.2%} (95 % interval {ddp['interval'][0]:+.2%} to "
        f"{ddp['interval'][1]:+.2%}, {ddp['pairs']} pairs), {ddp['operations_added']} operations more than "
        f"{ddp['operations']['plain']}"
    )
    result = {
        "data2_efficiency": round(kinds["data x2"]["efficiency"], 4),
        "pipeline2_efficiency": round(kinds["pipeline x2"]["efficiency"], 4),
        "ddp1_overhead": round(ddp["interval"][0], 5),
    }
    machine = {"cores": os.cpu_count(), "torch": torch.__version__, "load_before": load}
    machine["seconds"] = round(time.perf_counter() - start, 1)
    settings = {"model": arguments.model, "imgsz": arguments.imgsz, "rounds": arguments.rounds}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(result | {"settings": settings, "kinds": kinds, "ddp": ddp, "machine": machine}, indent=1) + "\n"
    )
    print(json.dumps(result))
    return None


if __name__ == "__main__":
    main()
