"""Samples at known places, each run of neighbours read from storage at once: a range of a tar, rows of a Parquet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from mqwen.data.conversation import to_json
from mqwen.data.dataset import Dataset
from mqwen.data.errors import SampleError
from mqwen.data.order import Place
from mqwen.data.sample import Sample, faults_of_a_sample, read_sample, sample_of
from mqwen.storage import Location, StorageError, TruncatedFileError, retried
from mqwen.telemetry import reading

Read = Callable[[Place], Sample]
WIDEST_GAP = 1 << 20  # bytes: S3 takes about as long for another request as for a megabyte


class Samples:
    """The samples at `places`, a run read when the first of it is asked for."""

    def __init__(self, datasets: Sequence[Dataset], places: Sequence[Place]) -> None:
        self._datasets = datasets
        self._places: dict[int, list[Place]] = {}
        for place in places:
            self._places.setdefault(place.run, []).append(place)
        self._runs: dict[int, Read] = {}

    def read(self, place: Place) -> Sample | SampleError:
        """Raises StorageError where storage fails; what is wrong with a sample, it says of it."""
        if place.run not in self._runs:
            self._runs[place.run] = retried(partial(_read_run, self._datasets[place.dataset], self._places[place.run]))
        try:
            sample = self._runs[place.run](place)
        except SampleError as error:
            return error
        if not place.key.endswith(sample.key) or sample.sha256() != place.sha256:
            return SampleError("unreadable", "its bytes are not those that were ingested")
        return sample


def _read_run(dataset: Dataset, run: list[Place]) -> Read:
    file, question = dataset.files / run[0].shard.file, dataset.manifest.question
    started = time.perf_counter()
    nbytes, read = (_parquet_rows if is_parquet(file.name) else _tar_range)(file, run, question)
    reading.READ_SECONDS.observe(time.perf_counter() - started, dataset=dataset.location.name)
    reading.READ_BYTES.add(nbytes, dataset=dataset.location.name)
    return read


def _tar_range(file: Location, run: list[Place], question: str) -> tuple[int, Read]:
    """Where the shard was cut short, the samples behind the cut are unreadable."""
    nbytes, members = 0, dict[int, bytes]()
    for first, stop, places in _stretches(run):
        try:
            data = file.read_range(first, stop - first)
        except TruncatedFileError as error:
            data = error.data
        nbytes += len(data)
        members |= {one.offset: data[one.offset - first : one.offset - first + one.nbytes] for one in places}
    return nbytes, lambda place: read_sample(members[place.offset], question)


def _stretches(run: list[Place]) -> Iterator[tuple[int, int, list[Place]]]:
    """Start, end and places of each part of the file that is read at once: one, where all of a run is wanted."""
    places, stop = list[Place](), 0
    for place in sorted(run, key=lambda place: place.offset):
        if places and place.offset - stop > WIDEST_GAP:
            yield places[0].offset, stop, places
            places = []
        places.append(place)
        stop = place.offset + place.nbytes
    yield places[0].offset, stop, places


def _parquet_rows(file: Location, run: list[Place], question: str) -> tuple[int, Read]:
    """Reads the row groups that the run touches: the least that a Parquet file gives."""
    wanted = range(min(place.offset for place in run), max(place.offset for place in run) + 1)
    try:
        with file.opened() as stream:
            first, rows = read_rows(pq.ParquetFile(stream), wanted)
    except (OSError, pa.ArrowException) as error:
        if file.sha256() == run[0].shard.sha256:  # which raises StorageError itself where the storage still fails
            raise StorageError(f"{file} cannot be read: {error}") from error
        damaged = SampleError("unreadable", f"{file}: {error}")
        return 0, lambda place: _raise(damaged)
    return rows.nbytes, lambda place: parquet_sample(rows, first, place.offset, question)


def is_parquet(name: str) -> bool:
    return name.endswith(".parquet")


def read_rows(parquet: pq.ParquetFile, wanted: range) -> tuple[int, pa.Table]:
    """The row groups that hold the wanted rows, and the number of their first row."""
    ends, first, groups = 0, 0, list[int]()
    for number in range(parquet.num_row_groups):
        start, ends = ends, ends + parquet.metadata.row_group(number).num_rows
        if start < wanted.stop and ends > wanted.start:
            first = start if not groups else first
            groups.append(number)
    return first, parquet.read_row_groups(groups)


def parquet_sample(rows: pa.Table, first: int, number: int, question: str) -> Sample:
    """Row `number` of a file, of which `rows` are those from `first` on. Raises SampleError, as `read_sample`."""
    if not 0 <= number - first < rows.num_rows:
        raise SampleError("unreadable", "its row is not there")
    with faults_of_a_sample():
        (fields,) = rows.slice(number - first, 1).to_pylist()
        sample = sample_of(str(number), fields.items(), question)
        to_json(sample.messages)  # a column may hold what no conversation does, as dates
        return sample


def _raise(error: SampleError) -> Sample:
    raise error
