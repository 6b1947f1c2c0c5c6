"""Writes the table of README.md from bench/results; with --check it only says whether the table is current."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
BEGIN, END = "<!-- bench/readme_table.py writes from here -->\n", "<!-- to here -->\n"


def results(name: str) -> dict[str, Any]:
    """Read the results of a bench; empty where it has not run."""
    file = REPOSITORY / "bench" / "results" / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def rows() -> list[tuple[str, str, str]]:
    """Say what was measured, its figure, and the command that measures it again."""
    table: list[tuple[str, str, str]] = []
    if peers := results("vs_peers"):
        ours, theirs = peers["medians"]["ours"], peers["medians"]["theirs"]
        what = f"training and evaluating, images/s over those of {peers['reference']} (BCCD, yolo11n, 320 px)"
        figure = f"{ours['images_per_s']:.1f} over {theirs['images_per_s']:.1f}: {peers['images_ratio']:.2f} x"
        table.append((what, figure, "`make bench-peers`"))
        table.append(
            (
                "the same: the step alone / the loader alone on one core / seconds to the first step",
                f"{peers['step_ratio']:.2f} x / {peers['loader_ratio']:.1f} x / {ours['start_s']:.1f} against "
                f"{theirs['start_s']:.1f}",
                "`make bench-peers`",
            )
        )
        table.append(
            (
                "the same: peak memory",
                f"{ours['memory_mb']:.0f} MB against {theirs['memory_mb']:.0f} MB",
                "`make bench-peers`",
            )
        )
    if ap := results("vs_peers_ap"):
        reached = "" if ap["reference_reached_it"] else " (it does not get there in its 50 epochs)"
        finals = f"{ap['final_ap_ours']:.3f} against {ap['final_ap_theirs']:.3f}"
        table.append(
            (
                "the same, 50 epochs from scratch: time to AP50-95 .45 over the reference's; AP of the best weights",
                f"{ap['time_to_ap_ratio']:.2f} x{reached}; {finals}",
                "`make bench-peers-ap`",
            )
        )
    if data := results("data"):
        sets = (("coco33", "coco33 at 640 px"), ("bccd", "BCCD at 320 px"), ("deeppcb", "DeepPCB at 640 px"))
        whole = "; ".join(
            f"{what} {data[f'{s}_encoded_ratio']:.1f} / {data[f'{s}_cached_ratio']:.1f}" for s, what in sets
        )
        host = "; ".join(
            f"{data[f'{s}_host_encoded_ratio']:.1f} / {data[f'{s}_host_cached_ratio']:.0f}" for s, _ in sets
        )
        what = "training loader, images/s of one core over the reference's, from files / from the decoded set"
        table.append((what, whole, "`make bench-data`"))
        table.append(("the host's share of that where a GPU draws the pictures", host, "`make bench-data`"))
    if norms := results("norms"):
        what = "a step of yolo11n on a CPU, 320 px, 16 images: norms by torch / by compiled code and freed memory kept"
        torch, both = norms["medians"]["torch"], norms["medians"]["both"]
        figure = (
            f"{torch['ms']:.0f} ms, {torch['resident_mb']:.0f} MB / {both['ms']:.0f} ms, {both['resident_mb']:.0f} MB"
        )
        table.append((what, figure, "`make bench-norms`"))
    if suppress := results("suppress"):
        what = "suppression on a CPU by the compiled kernel over tensor operations, 6,300 candidates an image"
        figure = f"{suppress['compiled_ms']:.1f} against {suppress['by_torch_ms']:.1f} ms an image"
        table.append((what, figure, "`make bench-suppress`"))
    if parallel := results("parallel"):
        figure = f"{parallel['data2_efficiency']:.2f} / {parallel['pipeline2_efficiency']:.2f} (ideal 1 / .89)"
        what = "two ranks on two cores over two runs side by side: data parallel / pipeline of two stages"
        table.append((what, figure, "`make bench-parallel`"))
    if scan := results("scan"):
        figure = f"{round(scan['entries_per_cpu_s'], -3):,} images/s per core"
        table.append(
            (f"first scan of {scan['images']:,} images with labels, by processor time", figure, "`make bench-scan`")
        )
    if seeds := results("bccd_accuracy"):
        what = "BCCD, 50 epochs from scratch, mean of seeds 0, 1, 2: AP50-95, AP50 by COCO's rules on val / test"
        figure = f"{seeds['val_ap']:.3f}, {seeds['val_ap50']:.3f} / {seeds['test_ap']:.3f}, {seeds['test_ap50']:.3f}"
        table.append((what, figure, "`make bench-bccd`"))
        what = "the same, AP50-95 as it trains by default less that in float32, and what the seed alone changes"
        figure = " / ".join(
            f"{seeds[f'{split}_ap_minus_float32']:+.3f} ± {seeds[f'{split}_ap_spread_of_seeds']:.3f}"
            for split in ("val", "test")
        )
        table.append((what, figure, "`make bench-bccd`"))
    if tune := results("tune"):
        table.append(
            (
                "four tuning trials side by side over one after the other, one core each",
                f"{tune['parallel_over_serial']:.2f} of the time",
                "`make bench-tune`",
            )
        )
        table.append(
            (
                "a search of the learning rate from .0001 to 10: time saved; confirmed AP over the defaults'",
                f"{tune['ruinous_time_saved']:.0%}; {tune['confirmed_best']:.3f} ± {tune['confirmed_best_spread']:.3f} "
                f"over {tune['confirmed_defaults']:.3f} ± {tune['confirmed_defaults_spread']:.3f}",
                "`make bench-tune`",
            )
        )
        table.append(
            (
                "its best.yaml trained by hand, three other seeds; seconds between trials of a slot, median / longest",
                f"{tune['by_hand']:.3f} ± {tune['by_hand_spread']:.3f}; "
                f"{tune['gap_seconds_median']:.1f} / {tune['gap_seconds_longest']:.1f}",
                "`make bench-tune`",
            )
        )
    return table


def render() -> str:
    """Write the table in Markdown."""
    lines = ["| what | figure | script |", "|---|---|---|"]
    return "".join(f"{line}\n" for line in [*lines, *(f"| {' | '.join(row)} |" for row in rows())])


def main() -> None:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, "README.md has lost the marks between which the table stands"
    current = before + BEGIN + render() + END + after
    if "--check" in sys.argv[1:]:
        if current != text:
            sys.exit("The table of README.md is not that of bench/results; run `python bench/readme_table.py`.")
    else:
        README.write_text(current)


if __name__ == "__main__":
    main()
