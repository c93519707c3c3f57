"""What a run did, from its records: summed up, drawn."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from mqwen.storage import Location
from mqwen.train.records import REPORT, read_evaluations, read_metrics

SMOOTHED = 50  # parts of a run; a curve's moving average is over one of them


def draw_loss(records: list[dict]) -> bytes:
    """The loss curve as a PNG."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    _curve(axes, records, [r["loss"] for r in records], "Training loss", "loss per answer token")
    return png(figure)


def write_report(run: Location) -> str:
    """Writes RUN/loss.png and the page REPORT, and says in a line how the run went."""
    records, evaluations = read_metrics(run), read_evaluations(run)
    (run / "loss.png").write_bytes(draw_loss(records))
    settings = json.loads((run / "settings.json").read_bytes())
    figures = _figures(records, evaluations)
    (run / REPORT).write_bytes(_page(run.name, figures, _draw_all(records, evaluations), settings).encode())
    seconds = sum(r["seconds"] for r in records)
    first, last = records[0]["loss"], records[-1]["loss"]
    held_out = f" (held out {evaluations[-1]['loss']:.3f})" if evaluations else ""
    return (
        f"{len(records)} steps in {seconds:.0f} s, loss {first:.3f} to {last:.3f}{held_out}, "
        f"{sum(r['images'] for r in records)} pictures, "
        f"{sum(r['positions'] for r in records) / seconds:,.0f} positions/s; {run / REPORT}"
    )


def _figures(records: list[dict], evaluations: list[dict]) -> dict[str, str]:
    seconds = sum(r["seconds"] for r in records)
    totals = {name: sum(r[name] for r in records) for name in ("positions", "tokens", "images", "data_wait")}
    found = {
        "steps": f"{len(records):,}",
        "loss, first and last step": f"{records[0]['loss']:.4f}, {records[-1]['loss']:.4f}",
        "time in steps": f"{seconds:,.0f} s",
        "positions, a second": f"{totals['positions']:,}, {totals['positions'] / seconds:,.0f}",
        "labelled positions, a second": f"{totals['tokens']:,}, {totals['tokens'] / seconds:,.0f}",
        "pictures, a second": f"{totals['images']:,}, {totals['images'] / seconds:,.1f}",
        "MFU": f"{sum(r['mfu'] * r['seconds'] for r in records) / seconds:.1%}",
        "wait for data": f"{totals['data_wait'] / seconds:.1%} of the time in steps",
        "goodput": f"{records[-1]['goodput']:.1%}",
        "most memory of rank 0": f"{max(r['memory'] for r in records) / 2**30:.2f} GiB",
    }
    if evaluations:
        best = min(evaluations, key=lambda one: one["loss"])
        found["held-out loss, last"] = f"{evaluations[-1]['loss']:.4f}"
        found["held-out loss, best"] = f"{best['loss']:.4f} after step {best['step']}"
    return found


def _draw_all(records: list[dict], evaluations: list[dict]) -> bytes:
    figure, grid = plt.subplots(4, 2, figsize=(12, 14), layout="constrained")
    loss, rate, norm, speed, mfu, wait, memory, goodput = grid.flat
    _curve(loss, records, [r["loss"] for r in records], "Loss", "per answer token")
    if evaluations:
        loss.plot([e["step"] for e in evaluations], [e["loss"] for e in evaluations], "o-", color="#c62828")
        loss.legend([*loss.get_legend_handles_labels()[1], "held out"])
    for pattern in records[-1]["learning_rates"]:
        rates = [r["learning_rates"].get(pattern) for r in records]
        rate.plot([r["step"] for r in records], rates, label=pattern or "all others")
    _label(rate, "Learning rates", "")
    rate.legend()
    _curve(norm, records, [r["gradient_norm"] for r in records], "Gradient norm", "before clipping")
    _curve(speed, records, [r["positions"] / r["seconds"] for r in records], "Speed", "positions/s")
    _curve(mfu, records, [100 * r["mfu"] for r in records], "MFU", "%")
    _curve(wait, records, [100 * r["data_wait"] / r["seconds"] for r in records], "Wait for data", "% of the step")
    _curve(memory, records, [r["memory"] / 2**30 for r in records], "Most memory of rank 0", "GiB")
    _curve(goodput, records, [100 * r["goodput"] for r in records], "Goodput", "%")
    return png(figure)


def _curve(axes: Axes, records: list[dict], values: list[float], title: str, unit: str) -> None:
    """Every step's value, and their moving average."""
    width = max(1, len(values) // SMOOTHED) + 1
    steps = [r["step"] for r in records]
    axes.plot(steps, values, color="#9ecae1", linewidth=0.8, label="each step")
    axes.plot(steps, moving_mean(values, width), color="#08519c", linewidth=1.8, label=f"mean of {width}")
    axes.legend()
    _label(axes, title, unit)


def moving_mean(values: Sequence[float], width: int) -> np.ndarray:
    """At each place the mean of the last `width` values that are numbers; a step that was left out may have none."""
    given = np.asarray(values, float)
    known = np.isfinite(given)
    sums, counts = (np.cumsum([0.0, *column]) for column in (np.where(known, given, 0.0), known))
    ends = np.arange(1, len(given) + 1)
    starts = np.maximum(ends - width, 0)
    with np.errstate(invalid="ignore"):  # none of them is a number
        return (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set(xlabel="step", ylabel=unit, ylim=(0, None), xlim=(0, None), title=title)
    axes.grid(alpha=0.3)


def png(figure: Any) -> bytes:
    """Closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _page(name: str, figures: dict[str, str], plots: bytes, settings: dict) -> str:
    rows = "".join(f"<tr><td>{html.escape(what)}<td>{html.escape(value)}" for what, value in figures.items())
    picture = base64.b64encode(plots).decode()
    return f"""<!doctype html>
<meta charset="utf-8"><title>{html.escape(name)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }} td {{ border: 1px solid #ccc; padding: .2rem .7rem }} img {{ max-width: 100% }}
</style>
<h1>{html.escape(name)}</h1>
<table>{rows}</table>
<img alt="Curves of the run" src="data:image/png;base64,{picture}">
<details><summary>Settings</summary><pre>{html.escape(json.dumps(settings, indent=1))}</pre></details>
"""
