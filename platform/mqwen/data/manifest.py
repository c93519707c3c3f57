"""A dataset on storage: shards, an index for each, and the manifest that commits them.

DATASET/manifest.json          shards with counts and hashes; written last, so a dataset is there or not
DATASET/shard-000000.tar       WebDataset tar; of a dataset that was indexed in place it lies elsewhere, or is Parquet
DATASET/shard-000000.parquet   its index: one row a sample, in the shard's order
DATASET/rejected.jsonl         what ingest left out: key, reason, detail
DATASET/report.html            statistics, and samples to look at; statistics.json holds its figures
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from mqwen.data.errors import DataError, EmptyDatasetError
from mqwen.storage import Location, MissingFileError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # of the sample's first tar header; of a Parquet file, the number of its row
        ("nbytes", pa.int64()),  # of all its members, headers and padding included; of a Parquet file's row, 1
        ("tokens", pa.int32()),  # of the rendered conversation, each picture one placeholder token
        ("images", pa.int32()),
        ("sha256", pa.string()),  # Sample.sha256
    ]
)


@dataclass(frozen=True)
class Shard:
    """What the manifest says of one shard: its counts, and the size and hash of its file and of its index.

    `name` is its index's, `file` that of the samples themselves.
    """

    name: str
    file: str
    samples: int
    tokens: int
    images: int
    nbytes: int
    sha256: str
    index_sha256: str


SHARD_SCHEMA = pa.schema([(f.name, pa.int64() if f.type == "int" else pa.string()) for f in fields(Shard)])


class Shards(Sequence[Shard]):
    """Shards as columns: the manifest of a hundred million samples has fifty thousand, and every reading task has it.

    `table` has the columns of SHARD_SCHEMA.
    """

    def __init__(self, shards: Iterable[Mapping[str, Any]] | pa.Table) -> None:
        is_table = isinstance(shards, pa.Table)
        self.table: Any = shards if is_table else pa.Table.from_pylist(list(shards), schema=SHARD_SCHEMA)

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, at: int) -> Shard: ...
    @overload
    def __getitem__(self, at: slice) -> list[Shard]: ...
    def __getitem__(self, at: int | slice) -> Shard | list[Shard]:
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        return Shard(**{name: column[at].as_py() for name, column in zip(SHARD_SCHEMA.names, self.table, strict=True)})

    def __iter__(self) -> Iterator[Shard]:
        return (Shard(**row) for row in self.table.to_pylist())

    def total(self, column: str) -> int:
        return int(self.table[column].to_numpy().sum())


@dataclass(frozen=True)
class Manifest:
    """`tokenizer` is the fingerprint of the tokenizer that counted the tokens; `rejected` counts by reason.

    Of a dataset that was indexed in place, `files` is the URI of the folder with the shards' files, else "";
    `question` is what their bare captions answer.
    """

    shards: Shards
    tokenizer: str
    rejected: dict[str, int]
    files: str = ""
    question: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def samples(self) -> int:
        return self.shards.total("samples")


def write_manifest(dataset: Location, manifest: Manifest) -> None:
    raw = {f.name: getattr(manifest, f.name) for f in fields(manifest)}
    (dataset / MANIFEST).write_bytes(json.dumps(raw | {"shards": manifest.shards.table.to_pylist()}, indent=1).encode())


def read_manifest(dataset: Location) -> Manifest:
    """The dataset's manifest. Raises DataError or EmptyDatasetError, before anything large is read."""
    try:
        raw = json.loads((dataset / MANIFEST).read_bytes())
        if (version := raw["format_version"]) != FORMAT_VERSION:
            raise DataError(
                f"{dataset} has format version {version}, this code reads {FORMAT_VERSION}; ingest it again"
            )
        manifest = Manifest(**{**raw, "shards": Shards(raw["shards"])})
        if manifest.shards.table.num_rows and manifest.shards.table["samples"].null_count:
            raise ValueError("a shard without counts")
    except MissingFileError as error:
        raise DataError(f"{dataset} is no dataset: it has no {MANIFEST}; jobs/ingest.py makes one") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
        raise DataError(f"{dataset / MANIFEST} is damaged ({error}); ingest the dataset again") from error
    if not manifest.samples:
        raise EmptyDatasetError(f"{dataset} holds no samples; rejected when it was ingested: {manifest.rejected}")
    return manifest


def write_index(dataset: Location, shard: str, rows: pa.Table) -> str:
    """Writes a shard's index, with the columns of INDEX_SCHEMA, and returns its SHA-256."""
    buffer = io.BytesIO()
    pq.write_table(rows.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA), buffer)
    data = buffer.getvalue()
    (dataset / f"{shard}.parquet").write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def read_index(dataset: Location, shard: Shard) -> pa.Table:
    """A shard's index, as INDEX_SCHEMA. Raises DataError where it is not the one that the manifest names."""
    file = dataset / f"{shard.name}.parquet"
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DataError(f"{file} is damaged, or of another ingest than {MANIFEST}; ingest the dataset again")
    return pq.read_table(io.BytesIO(data))
