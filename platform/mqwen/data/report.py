"""What ingest found: statistics of the samples, and a page with some of them to look at."""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from mqwen.data.dataset import Dataset
from mqwen.data.errors import SampleError
from mqwen.data.manifest import read_index
from mqwen.data.order import Place
from mqwen.data.runs import Samples
from mqwen.data.sample import Sample
from mqwen.model.chat import text_of
from mqwen.model.picture import upright_rgb

SHOWN = 24  # samples on the page
SIDE = 160  # pixels of a picture there


class Statistics:
    """Counts by name and then by value; those of a distribution by the power of two that a value does not reach."""

    NAMES = ("tokens a sample", "pictures a sample", "longer side, pixels", "aspect, long to short")

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {name: {} for name in self.NAMES}

    def count(self, rows: pa.Table) -> None:
        """Counts samples, with the columns of parts.PART_SCHEMA."""
        width, height = (rows[name].combine_chunks().flatten().to_numpy() for name in ("widths", "heights"))
        long, short = np.maximum(width, height), np.minimum(width, height)
        values = (
            _below(rows["tokens"].to_numpy()),
            rows["images"].to_pylist(),
            _below(long),
            [f"{ratio:.1f}" for ratio in np.minimum(long / np.maximum(short, 1), 10)],
        )
        self.add({name: dict(Counter(map(str, found))) for name, found in zip(self.NAMES, values, strict=True)})

    def add(self, other: dict[str, dict[str, int]]) -> None:
        for name, counts in other.items():
            summed = Counter(self.counts[name]) + Counter(counts)
            self.counts[name] = dict(sorted(summed.items(), key=lambda pair: float(pair[0])))


def _below(values: np.ndarray) -> list[int]:
    return [1 << int(value).bit_length() for value in values]


def write_report(dataset: Dataset, statistics: Statistics) -> None:
    """Writes DATASET/statistics.json and DATASET/report.html."""
    manifest = dataset.manifest
    totals = {name: manifest.shards.total(name) for name in ("samples", "tokens", "images", "nbytes")}
    totals["shards"] = len(manifest.shards)
    found = {"totals": totals, "rejected": manifest.rejected, "distributions": statistics.counts}
    (dataset.location / "statistics.json").write_bytes((json.dumps(found, indent=1) + "\n").encode())
    page = _page(dataset, totals, statistics)
    (dataset.location / "report.html").write_bytes(page.encode("utf-8", "backslashreplace"))


def _shown(dataset: Dataset) -> list[tuple[str, Sample | SampleError]]:
    """Samples spread evenly over the dataset, with their keys."""
    shards = dataset.manifest.shards
    ends = np.cumsum(shards.table["samples"].to_numpy())
    numbers = sorted({int(n) for n in np.linspace(0, ends[-1] - 1, SHOWN)})
    places = []
    for run, number in enumerate(numbers):
        at = int(np.searchsorted(ends, number, side="right"))
        shard = shards[at]
        (row,) = read_index(dataset.location, shard).slice(number - int(ends[at]) + shard.samples, 1).to_pylist()
        places.append(Place(shard=shard, run=run, **row))
    samples = Samples([dataset], places)
    return [(place.key, samples.read(place)) for place in places]


def _page(dataset: Dataset, totals: dict[str, int], statistics: Statistics) -> str:
    cards = "".join(_card(key, sample) for key, sample in _shown(dataset))
    return f"""<!doctype html>
<meta charset="utf-8"><title>{html.escape(dataset.location.name)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td {{ border: 1px solid #ccc; padding: .1rem .7rem }}
.bars td:last-child {{ width: 20rem }} i {{ display: block; height: .8rem; background: #9ecae1 }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem }}
.card {{ border: 1px solid #ddd; border-radius: 6px; padding: .6rem; font-size: .85rem; overflow-wrap: anywhere }}
.card img {{ max-width: 100%; border-radius: 3px }} p {{ margin: .3rem 0 }} b {{ color: #08519c }}
</style>
<h1>{html.escape(dataset.location.name)}</h1>
{_table(totals)}
<h2>Left out</h2>
{_table(dataset.manifest.rejected) if dataset.manifest.rejected else "<p>Nothing."}
{"".join(f"<h2>{name}</h2>{_bars(counts)}" for name, counts in statistics.counts.items() if counts)}
<h2>Samples</h2>
<div class="cards">{cards}</div>
"""


def _table(values: dict[str, Any]) -> str:
    return f"<table>{''.join(f'<tr><td>{name}<td>{value:,}' for name, value in values.items())}</table>"


def _bars(counts: dict[str, int]) -> str:
    most = max(counts.values())
    rows = (
        f'<tr><td>{value}<td>{count:,}<td><i style="width: {count / most:.1%}"></i>' for value, count in counts.items()
    )
    return f'<table class="bars">{"".join(rows)}</table>'


def _card(key: str, sample: Sample | SampleError) -> str:
    if isinstance(sample, SampleError):
        return f'<div class="card">{html.escape(key)}<p>{html.escape(str(sample))}</div>'
    pictures = "".join(f'<img alt="" src="{_thumbnail(picture)}">' for picture in sample.pictures)
    turns = "".join(
        f"<p><b>{html.escape(message['role'])}</b> {html.escape(text_of(message))}" for message in sample.messages
    )
    return f'<div class="card">{html.escape(key)}<br>{pictures}{turns}</div>'


def _thumbnail(picture: bytes) -> str:
    with Image.open(io.BytesIO(picture)) as opened:
        opened.draft("RGB", (SIDE, SIDE))
        image = upright_rgb(opened)
        image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
