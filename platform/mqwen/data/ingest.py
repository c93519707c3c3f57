"""Ingest: a source's samples, checked, into shards, indexes and the manifest that commits them.

Each task writes one shard with its index; the driver writes the manifest when all are there.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import ray

from mqwen.data.errors import DataError, EmptyDatasetError
from mqwen.data.manifest import MANIFEST, Manifest, Shard, write_index, write_manifest
from mqwen.data.sample import Sample, write_sample
from mqwen.model import MQWenProcessor
from mqwen.model.chat import encode_chat
from mqwen.storage import Location

REJECTED = "rejected.jsonl"


class Source(Protocol):
    """Where samples come from: a list of chunks, each read by one task into one shard."""

    def chunks(self, size: int) -> list[Any]: ...

    def read(self, chunk: Any) -> Iterator[tuple[str, Sample | DataError]]: ...


@dataclass(frozen=True)
class IngestSettings:
    """`max_rejected` is the share of samples that may be bad before the dataset is refused."""

    shard_samples: int = 2048
    max_rejected: float = 0.0


def ingest(
    source: Source,
    dataset: Location,
    processor: MQWenProcessor,
    settings: IngestSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Writes the dataset and returns its manifest; `progress(shards done, shards)` is called after each shard.

    Raises DataError where the dataset exists, or where more samples than `max_rejected` are bad: then no manifest
    is written and DATASET/rejected.jsonl lists them.
    """
    if (dataset / MANIFEST).exists():
        raise DataError(f"{dataset} is a dataset already; choose another folder or delete it")
    chunks = source.chunks(settings.shard_samples)
    if not chunks:
        raise EmptyDatasetError("the source holds no samples")
    items = [{"number": n, "chunk": pickle.dumps(chunk)} for n, chunk in enumerate(chunks)]
    written = ray.data.from_items(items, override_num_blocks=len(items)).map(_ShardWriter(source, dataset, processor))
    shards: dict[int, Shard] = {}
    rejected: list[dict[str, str]] = []
    for row in written.iter_rows():
        shards[row["number"]] = Shard(**json.loads(row["shard"]))
        rejected += json.loads(row["rejected"])
        progress(len(shards), len(chunks))
    samples = sum(shard.samples for shard in shards.values())
    if rejected:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected)
        (dataset / REJECTED).write_bytes(lines.encode())
    if len(rejected) > settings.max_rejected * (samples + len(rejected)):
        first = rejected[0]
        raise DataError(
            f"{len(rejected)} of {samples + len(rejected)} samples are bad, --settings.max-rejected allows a share of "
            f"{settings.max_rejected}. The first is {first['key']}: {first['reason']}. All: {dataset / REJECTED}"
        )
    if not samples:
        raise EmptyDatasetError("the source holds no samples that can be used")
    reasons = Counter(entry["reason"].split(":")[0] for entry in rejected)
    kept = [shards[n] for n in sorted(shards) if shards[n].samples]
    manifest = Manifest(kept, processor.tokenizer.fingerprint, dict(reasons))
    write_manifest(dataset, manifest)
    return manifest


@dataclass(frozen=True)
class _ShardWriter:
    source: Source
    dataset: Location
    processor: MQWenProcessor

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        name = f"shard-{item['number']:06d}"
        buffer, rows, rejected = io.BytesIO(), [], []
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, sample in self.source.read(pickle.loads(item["chunk"])):  # noqa: S301 (made by this module)
                entry = sample if isinstance(sample, DataError) else self._check(sample)
                if isinstance(entry, DataError):
                    rejected.append({"key": key, "reason": str(entry)})
                    continue
                start = buffer.tell()
                write_sample(tar, entry[0])
                rows.append(entry[1] | {"offset": start, "nbytes": buffer.tell() - start})
        data = buffer.getvalue()
        (self.dataset / f"{name}.tar").write_bytes(data)
        write_index(self.dataset, name, rows)
        tokens, images = sum(row["tokens"] for row in rows), sum(row["images"] for row in rows)
        shard = Shard(name, len(rows), tokens, images, len(data), hashlib.sha256(data).hexdigest())
        return {"number": item["number"], "shard": json.dumps(asdict(shard)), "rejected": json.dumps(rejected)}

    def _check(self, sample: Sample) -> tuple[Sample, dict[str, Any]] | DataError:
        """The sample with its index row, or what is wrong: every picture is decoded, every text tokenized."""
        try:
            for picture in sample.pictures:
                self.processor.pixels(picture)
            ids = encode_chat(self.processor.tokenizer, sample.messages).input_ids
        except ValueError as error:  # the model room's typed errors for pictures and conversations
            return DataError(f"{type(error).__name__}: {error}")
        row = {"key": sample.key, "tokens": len(ids), "images": len(sample.pictures), "sha256": sample.sha256()}
        return sample, row
