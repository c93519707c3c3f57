"""Results as lines, as a dated Markdown file, and as JSON."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks.h200.cases import Result
from tests.benchmarks.h200.measure import Ceilings

PARTS = ("data", "forward", "backward", "optimizer", "rest")


def line(result: Result) -> str:
    split = ", ".join(f"{part} {result.split[part] * 1e3:.0f}" for part in PARTS if part in result.split)
    return (
        f"{result.name}: {result.positions_per_s:,.0f} positions/s, {result.images_per_s:.0f} images/s, "
        f"{result.share_of_ceiling:.3f} of the product, MFU {result.mfu:.3f}, {result.memory / 1e9:.1f} GB "
        f"({result.reserved / 1e9:.1f} reserved), step {result.step_s * 1e3:.0f} ms ({split}), "
        f"first steps {result.first_steps_s:.0f} s, losses {result.losses[0]:.4f} to {result.losses[-1]:.4f}"
    ) + saved(result)


def saved(result: Result) -> str:
    """What checkpoints cost."""
    if not (known := result.checkpoint):
        return ""
    beside = statistics.mean(known["steps_beside"]) if known["steps_beside"] else math.nan
    stalls, calls, written = (
        ", ".join(f"{seconds:.2f}" for seconds in known[name]) for name in ("stalls", "calls", "written")
    )
    return (
        f"\n  checkpoints of {known['bytes'] / 1e9:.1f} GB: stalls {stalls} s, of them the calls {calls} s; committed "
        f"after {written} s; a step beside the writing {beside:.3f} s, an undisturbed one "
        f"{statistics.median(known['steps']):.3f} s; {known['memory'] / 1e9:.1f} GB of the CPU's memory for the copy"
    )


def write(folder: Path, about: dict[str, str], found: Ceilings, results: list[Result]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    about = about | {
        "commit": git.stdout.strip() or "unknown",
        "command": " ".join(["python", *sys.argv]),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    stem = folder / f"{datetime.now(UTC):%Y-%m-%d}-train_h200"
    content = {"about": about, "ceilings": asdict(found), "cases": [asdict(result) for result in results]}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    stem.with_suffix(".md").write_text(_markdown(about, found, results))


def _markdown(about: dict[str, str], found: Ceilings, results: list[Result]) -> str:
    head = ["case", "positions/s", "images/s", "GFLOP/position", "share", "MFU", "GB", "step, ms", *PARTS]
    lines = [
        "# Training on one H200",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        f"- bf16 product of 8192 x 8192: {found.product / 1e12:.0f} TFLOP/s, over two seconds "
        f"{found.sustained / 1e12:.0f}; copy {found.copy / 1e12:.2f} TB/s, read and written",
        "",
        "Share is of the product's rate, MFU of 989 TFLOP/s; operations as tests/benchmarks/h200/flops.py counts them.",
        "",
        "| " + " | ".join(head) + " |",
        "| --- " * len(head) + "|",
    ]
    for result in results:
        cells = [
            result.name,
            f"{result.positions_per_s:,.0f}",
            f"{result.images_per_s:.0f}",
            f"{result.flops_per_position / 1e9:.2f}",
            f"{result.share_of_ceiling:.3f}",
            f"{result.mfu:.3f}",
            f"{result.memory / 1e9:.1f}",
            f"{result.step_s * 1e3:.0f}",
            *(f"{result.split[part] * 1e3:.0f}" if part in result.split else "" for part in PARTS),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\n{result.name}:{saved(result)}" for result in results if result.checkpoint]
    return "\n".join(lines) + "\n"
