"""Ingest: a source's samples, checked, into shards, indexes and the manifest that commits them.

1. Each task makes one chunk's shards and its part: the list of all that it held (parts.py).
2. The driver finds duplicates by their hashes.
3. Each task makes the indexes of one part's shards, without what was rejected (indexes.py).
4. The driver writes the report, and last the manifest.

What was stopped goes on: parts that are there are not made again. A duplicate's bytes stay in its shard; the index
does not name them.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import ray.data

from mqwen.data.dataset import Dataset
from mqwen.data.errors import DataError, EmptyDatasetError
from mqwen.data.filters import LEFT_OUT, Filters
from mqwen.data.indexes import IndexWriter
from mqwen.data.manifest import MANIFEST, Manifest, Shards, write_manifest
from mqwen.data.parts import HASHES, PARTS, PartWriter, part_file
from mqwen.data.report import Statistics, write_report
from mqwen.data.sources.source import InPlace, Source
from mqwen.model import MQWenProcessor
from mqwen.storage import Location, MissingFileError, StorageError

REJECTED = "rejected.jsonl"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class IngestSettings:
    """A shard has at most `shard_samples`, and ends with the sample that brings it to `shard_bytes`.

    `max_rejected` is the share of samples that may be bad before the dataset is refused. Of samples that are equal in
    what `deduplicate` names (all of it; their text; their pictures) the first is kept.
    """

    shard_samples: int = 2048
    shard_bytes: int = 512 << 20
    max_rejected: float = 0.0
    deduplicate: tuple[Literal["sample", "text", "picture"], ...] = ("sample",)
    filters: Filters = field(default_factory=Filters)

    def check(self) -> None:
        """Raises DataError for what is out of range."""
        for option, value in (("shard-samples", self.shard_samples), ("shard-bytes", self.shard_bytes)):
            if value < 1:
                raise DataError(f"--settings.{option} is {value}; at least 1 is needed")
        if not 0 <= self.max_rejected <= 1:
            raise DataError(f"--settings.max-rejected is {self.max_rejected}; a share from 0 to 1 is allowed")
        self.filters.check()


@dataclass(frozen=True)
class Ingest:
    """A dataset to be written. Made with `prepare`, which refuses what can be refused before a task runs.

    `in_place` is the source whose files stay where they are; None has new shards written.
    """

    source: Source
    in_place: InPlace | None
    chunks: list[Any]
    dataset: Location
    processor: MQWenProcessor
    settings: IngestSettings

    @classmethod
    def prepare(
        cls,
        source: Source,
        dataset: Location,
        processor: MQWenProcessor,
        settings: IngestSettings,
        in_place: bool = False,
    ) -> Ingest:
        """`in_place` leaves the source's files where they are, and makes their indexes alone.

        Raises DataError for settings out of range, a dataset that exists, or a source that cannot be read.
        """
        settings.check()
        if in_place and not isinstance(source, InPlace):
            raise DataError("--in-place goes with webdataset and parquet: of other sources shards are written")
        if in_place and settings.filters.max_side:
            raise DataError("--in-place leaves pictures as they are: --settings.filters.max-side does not go with it")
        if (dataset / MANIFEST).exists():
            raise DataError(f"{dataset} is a dataset already; choose another folder or delete it")
        chunks = source.chunks(settings.shard_samples)
        if not chunks:
            raise EmptyDatasetError("the source holds no samples")
        files = source if in_place and isinstance(source, InPlace) else None
        return cls(source, files, chunks, dataset, processor, settings)

    def run(self, progress: Progress = lambda done, total: None) -> Manifest:
        """Writes the dataset and returns its manifest; `progress(chunks done, chunks)` is called after each.

        Raises DataError where more samples than `max_rejected` are bad: then no manifest is written and
        DATASET/rejected.jsonl lists them.
        """
        self._begin()
        dropped = self._duplicates(self._write_parts(progress))
        shards: list[dict[str, Any]] = []
        bad: list[dict[str, str]] = []
        statistics, reasons, spoiled = Statistics(), Counter[str](), set[int]()
        with (self.dataset / REJECTED).replace() as lines:
            for row in self._write_indexes(dropped):
                shards += json.loads(row["shards"])
                statistics.add(json.loads(row["statistics"]))
                for entry in json.loads(row["rejected"]):
                    reasons[entry["reason"]] += 1
                    lines.write((json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
                    if entry["reason"] not in LEFT_OUT:
                        bad.append(entry)
                        spoiled.add(row["number"])
        manifest = Manifest(
            Shards(shards),
            self.processor.tokenizer.fingerprint,
            dict(sorted(reasons.items())),
            str(self.in_place.files) if self.in_place else "",
            self.in_place.question if self.in_place else "",
        )
        try:
            self._check(manifest, bad)
        except DataError:
            for number in spoiled:  # when it is tried again, what was bad may have been mended
                part_file(self.dataset, number).delete()
            raise
        write_report(Dataset(self.dataset, manifest, self._files), statistics)
        write_manifest(self.dataset, manifest)
        with suppress(StorageError):  # the dataset is there; what stays takes room alone
            (self.dataset / PARTS).delete()
        return manifest

    @property
    def _files(self) -> Location:
        return self.in_place.files if self.in_place else self.dataset

    def _begin(self) -> None:
        """Notes what this ingest is, so that it goes on after a stop, and none other does in its place."""
        settings = asdict(self.settings)
        del settings["max_rejected"], settings["deduplicate"]  # no part depends on them
        what = [
            type(self.source).__name__,
            {name: str(value) for name, value in vars(self.source).items()},
            self.chunks,
            settings,
            str(self._files),
            self.processor.tokenizer.fingerprint,
            self.processor.image_size,
        ]
        fingerprint = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest().encode()
        note = self.dataset / PARTS / "ingest"
        try:
            if note.read_bytes() != fingerprint:
                raise DataError(
                    f"{self.dataset} holds another ingest that was stopped (other source or settings); go on with "
                    "that one, choose another folder or delete it"
                )
        except MissingFileError:
            note.write_bytes(fingerprint)

    def _write_parts(self, progress: Progress) -> list[np.ndarray]:
        """Of each part the hashes of its samples, (kinds, samples)."""
        settings = self.settings
        writer = PartWriter(
            self.in_place or self.source,
            self.in_place is not None,
            self.dataset,
            self.processor,
            settings.filters,
            settings.shard_samples,
            settings.shard_bytes,
        )
        items = [{"number": n, "chunk": pickle.dumps(chunk)} for n, chunk in enumerate(self.chunks)]
        hashes: dict[int, np.ndarray] = {}
        for row in _mapped(items, writer, ordered=False):
            hashes[row["number"]] = np.frombuffer(row["hashes"], np.int64).reshape(len(HASHES), -1)
            progress(len(hashes), len(items))
        return [hashes[number] for number in range(len(items))]

    def _duplicates(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        """Of each part, which samples are equal to an earlier one: bools."""
        hashes = np.concatenate(parts, axis=1)
        dropped = np.zeros(hashes.shape[1], bool)
        for kind in self.settings.deduplicate:
            (candidates,) = np.nonzero(~dropped & (hashes[HASHES.index(kind)] != 0))
            _, first = np.unique(hashes[HASHES.index(kind), candidates], return_index=True)
            dropped[np.delete(candidates, first)] = True
        return np.split(dropped, np.cumsum([part.shape[1] for part in parts])[:-1])

    def _write_indexes(self, dropped: list[np.ndarray]) -> Iterator[dict[str, Any]]:
        items = [{"number": number, "dropped": bools.tobytes()} for number, bools in enumerate(dropped)]
        return _mapped(items, IndexWriter(self.dataset), ordered=True)

    def _check(self, manifest: Manifest, bad: list[dict[str, str]]) -> None:
        total = manifest.samples + sum(manifest.rejected.values())
        if len(bad) > self.settings.max_rejected * total:
            counts = ", ".join(f"{n} for {reason}" for reason, n in Counter(entry["reason"] for entry in bad).items())
            raise DataError(
                f"{len(bad)} of {total} samples are bad ({counts}), --settings.max-rejected allows a share of "
                f"{self.settings.max_rejected}. The first is {bad[0]['key']}: {bad[0]['detail']}. "
                f"All: {self.dataset / REJECTED}"
            )
        if not manifest.samples:
            raise EmptyDatasetError(f"no sample of the source can be used; see {self.dataset / REJECTED}")


def _mapped(items: list[dict[str, Any]], task: Callable[[dict], dict], ordered: bool) -> Iterator[dict[str, Any]]:
    """The items' rows as tasks make them. Raises StorageError where storage failed in one."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = ordered
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        for row in ray.data.from_items(items, override_num_blocks=len(items)).map(task).iter_rows():
            if row["failed"]:
                raise StorageError(row["failed"])
            yield row
