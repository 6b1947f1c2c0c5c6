"""One sheet of training pictures with their boxes per augmentation, to look at: `sheets.py DATA FOLDER [imgsz]`."""

from __future__ import annotations

import sys
from pathlib import Path

from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.loader import TrainLoader
from paceline.drawing.boxes import batch_picture, save_picture

STILL = AugmentConfig(hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0, mosaic=0)
PICTURES = 8


def sheets() -> dict[str, AugmentConfig]:
    """Each augmentation alone, as strong as it gets; then the defaults, and everything together."""
    from dataclasses import replace

    alone: dict[str, dict[str, float]] = {
        "none": {},
        "hsv": {"hsv_h": 0.1, "hsv_s": 0.7, "hsv_v": 0.4},
        "translate_scale": {"translate": 0.2, "scale": 0.5},
        "degrees": {"degrees": 30},
        "shear": {"shear": 15},
        "perspective": {"perspective": 0.001},
        "flips": {"fliplr": 0.5, "flipud": 0.5},
        "mosaic": {"mosaic": 1},
        "mixup": {"mixup": 1},
        "cutmix": {"cutmix": 1},
        "copy_paste": {"copy_paste": 1},
        "greyscale": {"greyscale": 1},
        "bgr": {"bgr": 1},
    }
    made = {name: replace(STILL, **changes) for name, changes in alone.items()}  # type: ignore[arg-type]
    made["defaults"] = AugmentConfig()
    made["everything"] = AugmentConfig(
        degrees=10,
        shear=5,
        perspective=0.0005,
        flipud=0.5,
        mosaic=0.5,
        mixup=0.3,
        cutmix=0.5,
        copy_paste=0.7,
        greyscale=0.2,
        bgr=0.2,
    )
    return made


def main(data: str, folder: Path, imgsz: int) -> None:
    """Write the sheets."""
    folder.mkdir(parents=True, exist_ok=True)
    config = DataConfig(data=data, imgsz=imgsz, batch=PICTURES, workers=2, cache="ram")
    data_set = open_data_set(config, seed=0, splits=("train",))
    assert data_set.train is not None
    for name, augment in sheets().items():
        with TrainLoader(data_set.train, config, augment, seed=0) as loader:
            batch = next(iter(loader.epoch(0, mosaic=True)))
        picture = batch_picture(
            batch.images.numpy(), batch.boxes.numpy(), batch.labels.numpy(), batch.valid.numpy(), data_set.names
        )
        save_picture(folder / f"{name}.png", picture)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 320)
