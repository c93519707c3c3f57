"""What a run did, from its metrics: read, summed up, drawn."""

from __future__ import annotations

import io
import json

from mqwen.storage import Location


def read_metrics(run: Location) -> list[dict]:
    """One record a step, in order. Where a step was trained twice, after a fault, the later record counts."""
    records: dict[int, dict] = {}
    for name in (run / "metrics").names():
        for line in (run / "metrics" / name).read_bytes().splitlines():
            record = json.loads(line)
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def draw_loss(records: list[dict]) -> bytes:
    """The loss curve as a PNG: every step, and a moving average over a fiftieth of them."""
    import matplotlib  # for this alone, where a second of imports does not matter

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    width = max(1, len(losses) // 50)
    smooth = [
        sum(losses[max(0, i - width) : i + 1]) / len(losses[max(0, i - width) : i + 1]) for i in range(len(losses))
    ]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="each step")
    axes.plot(steps, smooth, color="#08519c", linewidth=1.8, label=f"mean of {width + 1}")
    axes.set(xlabel="step", ylabel="loss per answer token", ylim=(0, None), xlim=(0, None), title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def write_report(run: Location) -> str:
    """Draws RUN/loss.png and says in a line how the run went."""
    records = read_metrics(run)
    (run / "loss.png").write_bytes(draw_loss(records))
    seconds = sum(r["seconds"] for r in records)
    return (
        f"{len(records)} steps in {seconds:.0f} s, loss {records[0]['loss']:.3f} to {records[-1]['loss']:.3f}, "
        f"{sum(r['images'] for r in records)} pictures, "
        f"{sum(r['positions'] for r in records) / seconds:,.0f} positions/s"
    )
