"""Ingest: a source's samples, checked, into shards, indexes and the manifest that commits them.

Each task writes one shard with its index; the driver writes the manifest when all are there.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any, Protocol

import ray.data

from mqwen.data.encode import encode
from mqwen.data.errors import DataError, EmptyDatasetError, SampleError
from mqwen.data.manifest import MANIFEST, Manifest, Shard, write_index, write_manifest
from mqwen.data.sample import Sample, write_sample
from mqwen.model import MQWenProcessor
from mqwen.storage import Location, StorageError

REJECTED = "rejected.jsonl"


class Source(Protocol):
    """Where samples come from: a list of chunks, each read by one task into one shard."""

    def chunks(self, size: int) -> list[Any]: ...

    def read(self, chunk: Any) -> Iterator[tuple[str, Sample | SampleError]]: ...


@dataclass(frozen=True)
class IngestSettings:
    """`max_rejected` is the share of samples that may be bad before the dataset is refused."""

    shard_samples: int = 2048
    max_rejected: float = 0.0


@dataclass(frozen=True)
class Ingest:
    """A dataset to be written. Made with `prepare`, which refuses what can be refused before a task runs."""

    source: Source
    chunks: list[Any]
    dataset: Location
    processor: MQWenProcessor
    settings: IngestSettings

    @classmethod
    def prepare(cls, source: Source, dataset: Location, processor: MQWenProcessor, settings: IngestSettings) -> Ingest:
        """Raises DataError for settings out of range, a dataset that exists, or a source that cannot be read."""
        if settings.shard_samples < 1:
            raise DataError(f"--settings.shard-samples is {settings.shard_samples}; at least 1 is needed")
        if not 0 <= settings.max_rejected <= 1:
            raise DataError(f"--settings.max-rejected is {settings.max_rejected}; a share from 0 to 1 is allowed")
        if (dataset / MANIFEST).exists():
            raise DataError(f"{dataset} is a dataset already; choose another folder or delete it")
        chunks = source.chunks(settings.shard_samples)
        if not chunks:
            raise EmptyDatasetError("the source holds no samples")
        return cls(source, chunks, dataset, processor, settings)

    def run(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Manifest:
        """Writes the dataset and returns its manifest; `progress(shards done, shards)` is called after each shard.

        Raises DataError where more samples than `max_rejected` are bad: then no manifest is written and
        DATASET/rejected.jsonl lists them.
        """
        write_shard = _ShardWriter(self.source, self.dataset, self.processor)
        items = [{"number": n, "chunk": pickle.dumps(chunk)} for n, chunk in enumerate(self.chunks)]
        written = ray.data.from_items(items, override_num_blocks=len(items)).map(write_shard)
        shards: dict[int, Shard] = {}
        rejected: dict[int, list[dict[str, str]]] = {}
        for row in written.iter_rows():
            if row["failed"]:
                raise StorageError(row["failed"])
            shards[row["number"]] = Shard(**json.loads(row["shard"]))
            rejected[row["number"]] = json.loads(row["rejected"])
            progress(len(shards), len(self.chunks))
        kept = [shards[n] for n in sorted(shards) if shards[n].samples]
        left_out = [entry for n in sorted(rejected) for entry in rejected[n]]
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in left_out)
        (self.dataset / REJECTED).write_bytes(lines.encode("utf-8", "backslashreplace"))
        manifest = Manifest(
            kept, self.processor.tokenizer.fingerprint, dict(Counter(entry["reason"] for entry in left_out))
        )
        self._check(manifest, left_out)
        write_manifest(self.dataset, manifest)
        return manifest

    def _check(self, manifest: Manifest, rejected: list[dict[str, str]]) -> None:
        total = manifest.samples + len(rejected)
        if len(rejected) > self.settings.max_rejected * total:
            counts = ", ".join(f"{count} for {reason}" for reason, count in manifest.rejected.items())
            first = rejected[0]
            raise DataError(
                f"{len(rejected)} of {total} samples are bad ({counts}), --settings.max-rejected allows a share of "
                f"{self.settings.max_rejected}. The first is {first['key']}: {first['detail']}. "
                f"All: {self.dataset / REJECTED}"
            )
        if not manifest.samples:
            raise EmptyDatasetError(f"no sample of the source can be used; see {self.dataset / REJECTED}")


@dataclass(frozen=True)
class _ShardWriter:
    source: Source
    dataset: Location
    processor: MQWenProcessor

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        # What a task raises reaches the driver as Ray's error, with a trace for text: storage's own goes by the row.
        shard, rejected, failed = None, list[dict[str, str]](), ""
        try:
            shard, rejected = self._write(f"shard-{item['number']:06d}", pickle.loads(item["chunk"]))  # noqa: S301 (ours)
        except StorageError as error:
            failed = str(error)
        return {
            "number": item["number"],
            "shard": json.dumps(shard and asdict(shard)),
            "rejected": json.dumps(rejected),
            "failed": failed,
        }

    def _write(self, name: str, chunk: Any) -> tuple[Shard, list[dict[str, str]]]:
        rows, rejected = [], []
        with (self.dataset / f"{name}.tar").replace() as stream:
            shard = _Counted(stream)
            with tarfile.open(fileobj=shard, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
                for key, sample in self.source.read(chunk):
                    try:
                        if isinstance(sample, SampleError):
                            raise sample
                        row = self._index_row(sample)
                    except SampleError as error:
                        rejected.append({"key": key, "reason": error.reason, "detail": error.detail})
                        continue
                    start = shard.tell()
                    write_sample(tar, sample)
                    rows.append(row | {"offset": start, "nbytes": shard.tell() - start})
        entry = Shard(
            name,
            samples=len(rows),
            tokens=sum(row["tokens"] for row in rows),
            images=sum(row["images"] for row in rows),
            nbytes=shard.tell(),
            sha256=shard.digest.hexdigest(),
            index_sha256=write_index(self.dataset, name, rows),
        )
        return entry, rejected

    def _index_row(self, sample: Sample) -> dict[str, Any]:
        """What the index says of the sample, its place apart; raises SampleError where training could not read it."""
        chat, pictures = encode(self.processor, sample)
        return {
            "key": sample.key,
            "tokens": len(chat.input_ids),
            "images": len(pictures),
            "sha256": sample.sha256(),
        }


class _Counted:
    """A stream that knows its length and hash, so that a shard need not be in memory to have them."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._length, self.digest = stream, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._stream.write(data)
        self.digest.update(data)
        self._length += len(data)
        return len(data)

    def tell(self) -> int:
        return self._length
