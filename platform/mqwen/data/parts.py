"""One ingest task: a chunk of the source becomes shards, and a part: the list of all that the chunk held.

DATASET/parts/part-000000.parquet    with the columns of PART_SCHEMA; written last, so a part is there or not
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mqwen.data.conversation import check_text, to_json
from mqwen.data.encode import encode
from mqwen.data.errors import SampleError
from mqwen.data.filters import Filters, picture_size
from mqwen.data.manifest import INDEX_SCHEMA
from mqwen.data.sample import Sample
from mqwen.data.shards import ShardWriter
from mqwen.data.sources.source import InPlace, Source
from mqwen.model import MQWenProcessor
from mqwen.storage import Location, MissingFileError, StorageError, local_file, locate

PARTS = "parts"
HASHES = ("sample", "text", "picture")
PART_SCHEMA = pa.schema(
    [
        *INDEX_SCHEMA,  # null, as the next columns, of a sample that was rejected
        ("shard", pa.string()),
        *((kind, pa.int64()) for kind in HASHES),  # parts of SHA-256; of a sample without pictures their hash is null
        ("widths", pa.list_(pa.int32())),
        ("heights", pa.list_(pa.int32())),
        ("reason", pa.string()),  # null of a sample that was kept, as the next
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Part:
    """`rows` are PART_SCHEMA's; `shards` says of each shard its name, file, nbytes and sha256."""

    rows: pa.Table
    shards: list[dict[str, Any]]


def part_file(dataset: Location, number: int) -> Location:
    return dataset / PARTS / f"part-{number:06d}.parquet"


def write_part(dataset: Location, number: int, part: Part) -> None:
    out = io.BytesIO()
    pq.write_table(part.rows.replace_schema_metadata({"shards": json.dumps(part.shards)}), out)
    part_file(dataset, number).write_bytes(out.getvalue())


def read_part(dataset: Location, number: int) -> Part:
    """Raises MissingFileError where it was not written yet."""
    rows = pq.read_table(io.BytesIO(part_file(dataset, number).read_bytes()))
    return Part(rows, json.loads(rows.schema.metadata[b"shards"]))


@dataclass(frozen=True)
class PartWriter:
    """Ray Data's: makes the parts of chunks. One that is there already, from an ingest that was stopped, stays."""

    source: Source | InPlace
    in_place: bool
    dataset: Location
    processor: MQWenProcessor
    filters: Filters
    shard_samples: int
    shard_bytes: int

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """{"number", "chunk": pickled} to {"number", "hashes": the part's three columns of HASHES, "failed"}.

        What a task raises reaches the driver as Ray's error, with a trace for text: storage's own goes by the row.
        """
        number, hashes, failed = item["number"], b"", ""
        try:
            try:
                part = read_part(self.dataset, number)
            except MissingFileError:
                part = self._make(f"shard-{number:06d}", pickle.loads(item["chunk"]))  # noqa: S301 (ours)
                write_part(self.dataset, number, part)
            hashes = np.stack([pc.fill_null(part.rows[kind], 0).to_numpy() for kind in HASHES]).tobytes()
        except StorageError as error:
            failed = str(error)
        return {"number": number, "hashes": hashes, "failed": failed}

    def _make(self, name: str, chunk: Any) -> Part:
        rows: list[dict[str, Any]] = []
        if self.in_place:
            assert isinstance(self.source, InPlace)
            with local_file(self.source.files / chunk) as file:  # once: it may come from far
                for key, found, offset, nbytes in self.source.scan(file):
                    row, _ = self._judged(key, found)
                    rows.append(row | {"shard": name, "offset": offset, "nbytes": nbytes})
                whole = locate(file)
                shards = [{"name": name, "file": chunk, "nbytes": whole.size(), "sha256": whole.sha256()}]
        else:
            with ShardWriter(self.dataset, name, self.shard_samples, self.shard_bytes) as writer:
                for key, found in self.source.read(chunk):
                    row, sample = self._judged(key, found)
                    rows.append(row | writer.add(sample) if sample else row)
            shards = writer.shards
        return Part(pa.Table.from_pylist(rows, schema=PART_SCHEMA), shards)

    def _judged(self, key: str, found: Sample | SampleError) -> tuple[dict[str, Any], Sample | None]:
        """What the part says of the sample, its place apart, and the sample as it is to be stored; None if rejected."""
        try:
            if isinstance(found, SampleError):
                raise found
            check_text(found.messages)
            chat, pictures = encode(self.processor, found)
            sizes = [picture_size(picture) for picture in found.pictures]
            for width, height in sizes:
                self.filters.judge(width, height)
        except SampleError as error:
            detail = error.detail.encode("utf-8", "backslashreplace").decode()  # it may quote half a surrogate pair
            return {"key": key, "reason": error.reason, "detail": detail}, None
        stored = Sample(key, found.messages, [self.filters.shrink(one) for one in found.pictures], found.source)
        row = {
            "key": key,
            "tokens": len(chat.input_ids),
            "images": len(pictures),
            "sha256": stored.sha256(),
            "sample": _hash(found.sha256().encode()),
            "text": _hash(to_json(found.messages, sort_keys=True)),
            "picture": _hash(*found.pictures) if found.pictures else None,
            "widths": [width for width, _ in sizes],
            "heights": [height for _, height in sizes],
        }
        return row, stored


def _hash(*contents: bytes) -> int:
    """Eight bytes of it: of a hundred million samples, two share theirs by chance in one of four thousand datasets."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).digest()
    return int.from_bytes(digest[:8], signed=True) or 1  # 0 is none
