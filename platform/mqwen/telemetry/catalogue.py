"""All metrics, by area, and the table of them."""

from mqwen.telemetry import reading, serving, storing, training
from mqwen.telemetry.metric import Metric

AREAS = (training, reading, storing, serving)
METRICS = {area: [value for value in vars(area).values() if isinstance(value, Metric)] for area in AREAS}

HEAD = """# Metrics

Made by `python -m mqwen.telemetry`. Every Ray node serves its metrics over HTTP; Ray writes the addresses for
Prometheus to `/tmp/ray/prom_metrics_service_discovery.json` on the head node.

- Ray adds labels of its own to each series. One is `WorkerId`, the process: sum over it.
- A histogram has the series `_bucket`, `_count` and `_sum`. Ray guesses the sum from the middles of the buckets.
- Ray reports each ten seconds. Gauges of a process that has ended are gone after twenty; its counters stay.
"""


def table() -> str:
    """The metrics as Markdown."""
    parts = [HEAD.rstrip()]
    for area, metrics in METRICS.items():
        parts.append(f"\n## {(area.__doc__ or '').splitlines()[0]}\n")
        parts.append("| name | kind | unit | labels | meaning |\n|---|---|---|---|---|")
        for metric in metrics:
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            parts.append(f"| `{metric.exported}` | {metric.kind} | {metric.unit} | {labels} | {metric.help} |")
    return "\n".join(parts) + "\n"
