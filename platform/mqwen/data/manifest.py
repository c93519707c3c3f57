"""A dataset on storage: shards, an index beside each, and the manifest that commits them.

DATASET/manifest.json          shards with counts and hashes; written last, so a dataset is there or not
DATASET/shard-000000.tar       WebDataset tar
DATASET/shard-000000.parquet   its index: one row a sample, in the tar's order
DATASET/rejected.jsonl         what ingest left out: key, reason, detail
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mqwen.data.errors import DataError, EmptyDatasetError
from mqwen.storage import Location, MissingFileError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # of the sample's first tar header
        ("nbytes", pa.int64()),  # of all its members, headers and padding included
        ("tokens", pa.int32()),  # of the rendered conversation, each picture one placeholder token
        ("images", pa.int32()),
        ("sha256", pa.string()),  # Sample.sha256
    ]
)


@dataclass(frozen=True)
class Shard:
    """What the manifest says of one shard: its counts, and the size and hash of its tar and of its index."""

    name: str
    samples: int
    tokens: int
    images: int
    nbytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """`tokenizer` is the fingerprint of the tokenizer that counted the tokens; `rejected` counts by reason."""

    shards: list[Shard]
    tokenizer: str
    rejected: dict[str, int]
    format_version: int = FORMAT_VERSION

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def write_manifest(dataset: Location, manifest: Manifest) -> None:
    (dataset / MANIFEST).write_bytes(json.dumps(asdict(manifest), indent=1).encode())


def read_manifest(dataset: Location) -> Manifest:
    """The dataset's manifest. Raises DataError or EmptyDatasetError, before anything large is read."""
    try:
        raw = json.loads((dataset / MANIFEST).read_bytes())
        if (version := raw["format_version"]) != FORMAT_VERSION:
            raise DataError(
                f"{dataset} has format version {version}, this code reads {FORMAT_VERSION}; ingest it again"
            )
        manifest = Manifest(**{**raw, "shards": [Shard(**shard) for shard in raw["shards"]]})
    except MissingFileError as error:
        raise DataError(f"{dataset} is no dataset: it has no {MANIFEST}; jobs/ingest.py makes one") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{dataset / MANIFEST} is damaged ({error}); ingest the dataset again") from error
    if not manifest.samples:
        raise EmptyDatasetError(f"{dataset} holds no samples; rejected when it was ingested: {manifest.rejected}")
    return manifest


def check_shards(dataset: Location, manifest: Manifest) -> None:
    """Raises DataError where a shard is missing or is not as long as it was written. Costs one listing."""
    sizes = dataset.sizes()
    for shard in manifest.shards:
        name = f"{shard.name}.tar"
        if name not in sizes:
            raise DataError(f"{dataset / name} is missing; copy the dataset again, or ingest it again")
        if sizes[name] != shard.nbytes:
            raise DataError(
                f"{dataset / name} has {sizes[name]} bytes, {shard.nbytes} were written; copy the dataset again, or "
                "ingest it again"
            )


def check_tokenizer(dataset: Location, manifest: Manifest, fingerprint: str) -> None:
    """Raises DataError where another tokenizer than the one of this fingerprint counted the dataset's tokens."""
    if manifest.tokenizer != fingerprint:
        raise DataError(f"{dataset} was ingested with another tokenizer than this model's; ingest it again")


def write_index(dataset: Location, shard: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes a shard's index and returns its SHA-256."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=INDEX_SCHEMA), buffer)
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
