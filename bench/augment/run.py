"""CPU time of the numbers of a batch: random draws, transforms, and targets of 16 pictures with 8 boxes per image."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import numpy as np

from paceline.data import augment, targets
from paceline.data.config import AugmentConfig
from paceline.data.index import Index, Strings

NUM_IMAGES, BOXES_EACH, BATCH, ROUNDS = 264, 8, 16, 400
CONFIGS = {
    "defaults": AugmentConfig(),
    "turned": AugmentConfig(degrees=10, perspective=0.0005),
    "mixed": AugmentConfig(mixup=0.2, cutmix=0.2),
}


def synthetic_index() -> Index:
    """Images of 640 x 480 px with boxes at random."""
    number = NUM_IMAGES * BOXES_EACH
    random = np.random.default_rng(0)
    low = random.uniform(0, 300, (number, 2))
    return Index(
        names=("thing",),
        root=Path(),
        paths=Strings.of(map(str, range(NUM_IMAGES))),
        sizes=np.tile(np.array([[480, 640]], np.int32), (NUM_IMAGES, 1)),
        orientation=np.ones(NUM_IMAGES, np.uint8),
        offsets=np.arange(0, number + 1, BOXES_EACH),
        boxes=np.concatenate([low, low + random.uniform(5, 150, (number, 2))], axis=1),
        labels=np.zeros(number, np.int32),
        crowd=np.zeros(number, np.bool_),
        difficult=np.zeros(number, np.bool_),
        area=np.ones(number),
        image_ids=np.arange(NUM_IMAGES),
        category_ids=np.zeros(1, np.int64),
        origins=np.arange(NUM_IMAGES),
    )


def one_batch(index: Index, config: AugmentConfig, step: int) -> tuple[float, float, float]:
    """Milliseconds of draws, transforms and targets."""
    samples = (np.arange(BATCH) + step * BATCH) % NUM_IMAGES
    start = time.thread_time()
    draws = augment.draw(3, np.zeros(BATCH, np.int64), samples)
    partners = augment.partners_of_all(augment.partner_draws(config, draws), NUM_IMAGES)
    images = np.concatenate([samples[:, None], partners], axis=1)
    drawn = time.thread_time()
    ones = np.ones(images.shape, np.int64)
    transforms = augment.plan(config, 640, draws, images, index.sizes[images], ones, mosaic=True)
    planned = time.thread_time()
    targets.padded(*targets.transformed(index, transforms), BATCH)
    return 1e3 * (drawn - start), 1e3 * (planned - drawn), 1e3 * (time.thread_time() - planned)


def main() -> None:
    """Print a table of medians and a line of JSON."""
    index, found = synthetic_index(), {}
    print(f"{'options':10}{'draws':>8}{'plan':>8}{'targets':>9}{'all':>8}  ms per batch of {BATCH}")
    for name, config in CONFIGS.items():
        rounds = [one_batch(index, config, step) for step in range(ROUNDS)][ROUNDS // 8 :]
        parts = [statistics.median(column) for column in zip(*rounds, strict=True)]
        found[name] = {
            key: round(value, 4)
            for key, value in zip(("draws_ms", "plan_ms", "targets_ms", "all_ms"), [*parts, sum(parts)], strict=True)
        }
        print(f"{name:10}{parts[0]:8.3f}{parts[1]:8.3f}{parts[2]:9.3f}{sum(parts):8.3f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
