"""AP of yolo11n from scratch on BCCD, 50 epochs, three seeds, best weights scored on val and test; ends with JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from machine import machine

from paceline import YOLO
from paceline.commands.val import validate
from paceline.options import ValOptions

REPOSITORY = Path(__file__).resolve().parents[2]
SPLITS = ("val", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "bccd_voc")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "runs" / "bccd", help="finished runs are reused")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"{options.data} does not exist; name the folder of BCCD with --data.")
    rows: list[dict[str, float]] = []
    print("seed      val AP  val AP50   test AP test AP50  seconds")
    for seed in range(options.seeds):
        folder = options.runs / f"seed{seed}"
        if not (folder / "weights" / "best.json").exists():
            YOLO("yolo11n").train(
                data=str(options.data), imgsz=320, batch=16, epochs=options.epochs, seed=seed,
                project=str(options.runs), name=f"seed{seed}", exist_ok=True,
            )  # fmt: skip
        row: dict[str, float] = {}
        for split in SPLITS:
            flat = {"model": str(folder), "data": str(options.data), "split": split, "plots": False,
                    "project": str(options.runs), "name": f"seed{seed}_{split}", "exist_ok": True}  # fmt: skip
            record = validate(ValOptions.from_flat(flat)).record
            row |= {f"{split}_ap": record.ap, f"{split}_ap50": record.ap50}
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        row["seconds"] = [line["elapsed_s"] for line in lines if line["kind"] == "epoch"][-1]
        rows.append(row)
        print(
            f"{seed:4} " + " ".join(f"{row[key]:9.4f}" for key in row if key != "seconds") + f" {row['seconds']:8.0f}"
        )
    result = {key: round(statistics.mean(row[key] for row in rows), 4) for key in rows[0]}
    record = result | {"runs": rows, "epochs": options.epochs, "machine": machine()}
    (REPOSITORY / "bench" / "results").mkdir(exist_ok=True)
    (REPOSITORY / "bench" / "results" / "bccd_accuracy.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
