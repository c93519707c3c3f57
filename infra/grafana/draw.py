"""The dashboards as pictures, where no Grafana is: each panel's data of the last minutes, asked of Prometheus.

python -m infra.grafana.draw --prometheus http://127.0.0.1:9090 --out out/dashboards [--minutes 60]
"""

import json
import math
import re
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes
from matplotlib.dates import ConciseDateFormatter
from matplotlib.ticker import EngFormatter, Formatter, PercentFormatter

from infra.grafana.make import HERE
from mqwen.train.report import png

UNIT, MARGIN = 0.62, 0.11  # inches of one of Grafana's 24 columns; what a panel keeps free around it, in its own size
WINDOW = "1m"  # Grafana's $__rate_interval, four scrapes at least
STEPS = 240  # values of a series
FORMATS: dict[str, Formatter] = {
    "percent": PercentFormatter(100),
    "percentunit": PercentFormatter(1),
    "s": EngFormatter("s"),
    "bytes": EngFormatter("B"),
    "Bps": EngFormatter("B/s"),
    "reqps": EngFormatter("/s"),
    "decmbytes": EngFormatter("MB"),
    "short": EngFormatter(),
}


@dataclass(frozen=True)
class Series:
    """`times` are Unix seconds."""

    legend: str
    times: list[float]
    values: list[float]


@dataclass(frozen=True)
class Period:
    """Unix seconds."""

    start: float
    end: float


def concrete(expression: str) -> str:
    """With all runs, models and datasets for the dashboard's variables."""
    return re.sub(r"\$(run|model|dataset)\b", ".*", expression.replace("$__rate_interval", WINDOW))


def ask(prometheus: str, target: dict[str, Any], period: Period) -> list[Series]:
    """A panel's target over the period. Raises ValueError with Prometheus' words where it is no PromQL."""
    step = max((period.end - period.start) / STEPS, 1)
    asked = {"query": concrete(target["expr"]), "start": period.start, "end": period.end, "step": step}
    answer = httpx.get(f"{prometheus}/api/v1/query_range", params=asked, timeout=60).json()
    if answer["status"] != "success":
        raise ValueError(f"{target['expr']}: {answer['error']}")
    found = []
    for one in answer["data"]["result"]:
        legend = re.sub(r"\{\{(\w+)\}\}", lambda name, of=one["metric"]: of.get(name[1], ""), target["legendFormat"])
        points = [(float(at), float(value)) for at, value in one["values"]]
        points = [(at, value) for at, value in points if math.isfinite(value)]
        if points:
            found.append(Series(legend, *map(list, zip(*points, strict=True))))
    return found


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def answers(prometheus: str, dashboard: dict[str, Any], period: Period) -> dict[str, list[Series]]:
    """Each panel's series, by its title."""
    return {
        panel["title"]: [series for target in panel["targets"] for series in ask(prometheus, target, period)]
        for panel in panels(dashboard)
    }


def draw(dashboard: dict[str, Any], data: dict[str, list[Series]], period: Period) -> bytes:
    """A PNG of the panels where Grafana has them."""
    rows = max(place["y"] + place["h"] for place in (panel["gridPos"] for panel in dashboard["panels"]))
    height = rows + 1
    figure = plt.figure(figsize=(24 * UNIT, height * UNIT * 0.62))
    figure.text(0.01, 1 - 0.5 / height, dashboard["title"], fontsize=15, weight="bold", va="center")
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        top = 1 - (place["y"] + 1) / height
        if panel["type"] == "row":
            figure.text(0.01, top - 0.5 / height, panel["title"], fontsize=12, color="#555555", va="center")
            continue
        left, width = place["x"] / 24, place["w"] / 24
        tall = place["h"] / height
        box = (left + 1.5 * MARGIN * width, top - 0.83 * tall, width * (1 - 2 * MARGIN), 0.7 * tall)
        draw_panel(figure.add_axes(box), panel, data[panel["title"]], period)
    return png(figure)


def draw_panel(axes: Axes, panel: dict[str, Any], data: list[Series], period: Period) -> None:
    for series in data:
        style = "o-" if len(series.times) == 1 else "-"
        times = [datetime.fromtimestamp(at) for at in series.times]
        axes.plot(times, series.values, style, linewidth=1.4, markersize=3, label=series.legend)
    axes.set_title(panel["title"], fontsize=10, loc="left")
    axes.set_xlim(datetime.fromtimestamp(period.start), datetime.fromtimestamp(period.end))
    axes.set_ylim(0, None if any(value for series in data for value in series.values) else 1)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator()))
    axes.yaxis.set_major_formatter(FORMATS[panel["fieldConfig"]["defaults"]["unit"]])
    axes.tick_params(labelsize=7)
    axes.xaxis.get_offset_text().set_visible(False)
    axes.grid(alpha=0.3)
    if data:
        axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
    else:
        said = panel.get("description", "No data.")
        axes.set_yticks([])
        axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", fontsize=8, color="#888888")


@dataclass(frozen=True)
class Draw:
    prometheus: str
    out: Path
    minutes: float = 60


def main() -> None:
    command = tyro.cli(Draw, description=__doc__)
    period = Period(time.time() - 60 * command.minutes, time.time())
    command.out.mkdir(parents=True, exist_ok=True)
    for file in sorted(HERE.glob("*.json")):
        dashboard = json.loads(file.read_text())
        picture = command.out / f"{dashboard['uid']}.png"
        picture.write_bytes(draw(dashboard, answers(command.prometheus, dashboard, period), period))
        print(picture)


if __name__ == "__main__":
    main()
