"""The second ingest task: the indexes of one part's shards, without what was rejected."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mqwen.data.manifest import write_index
from mqwen.data.parts import read_part
from mqwen.data.report import Statistics
from mqwen.storage import Location, StorageError


@dataclass(frozen=True)
class IndexWriter:
    dataset: Location

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """{"number", "dropped": a bool for each of the part's samples} to {"number", "shards", "rejected",
        "statistics": all three JSON, "failed": why storage did}."""
        result: dict[str, Any] = {"number": item["number"], "failed": ""}
        try:
            made = self._write(item["number"], np.frombuffer(item["dropped"], bool))
            result |= {name: json.dumps(value) for name, value in made.items()}
        except StorageError as error:
            result |= {"shards": "", "rejected": "", "statistics": "", "failed": str(error)}
        return result

    def _write(self, number: int, dropped: np.ndarray) -> dict[str, Any]:
        part = read_part(self.dataset, number)
        bad = part.rows["reason"].is_valid().to_numpy()
        rejected = part.rows.select(["key", "reason", "detail"]).filter(pa.array(bad)).to_pylist()
        copies = part.rows["key"].filter(pa.array(dropped)).to_pylist()
        rejected += [{"key": key, "reason": "duplicate", "detail": "an equal one stands before it"} for key in copies]
        kept = part.rows.filter(pa.array(~bad & ~dropped))
        shards = []
        for shard in part.shards:
            rows = kept.filter(pc.equal(kept["shard"], shard["name"]))
            if rows.num_rows:
                counts = {name: int(pc.sum(rows[name]).as_py()) for name in ("tokens", "images")}
                index = {"index_sha256": write_index(self.dataset, shard["name"], rows)}
                shards.append(shard | {"samples": rows.num_rows} | counts | index)
        statistics = Statistics()
        statistics.count(kept)
        return {"shards": shards, "rejected": rejected, "statistics": statistics.counts}
