"""WebDataset tars and Parquet files of Hugging Face's making: rewritten into shards of ours, or indexed where they lie.

A tar's sample is its neighbouring members of one key, a Parquet's is a row. Which of their fields are pictures, and
which hold the conversation or a caption, sample.py and conversation.py say.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from mqwen.data.errors import DataError, SampleError
from mqwen.data.runs import is_parquet, parquet_sample, read_rows
from mqwen.data.sample import Sample, read_sample, split_name
from mqwen.data.sources.captions import QUESTION
from mqwen.data.sources.keys import Keys
from mqwen.storage import Location, local_file

DAMAGED = "damaged file"
Scanned = tuple[str, Sample | SampleError, int, int]


@dataclass(frozen=True)
class StoredSource:
    """The files directly in the folder `files` whose names end in `suffix`. A bare caption answers `question`."""

    suffix: ClassVar[str]

    files: Location
    question: str = QUESTION

    def chunks(self, size: int) -> list[str]:
        """The files' names: each is a chunk, whatever its size. Raises DataError where there are none."""
        if found := [name for name in self.files.names() if name.endswith(self.suffix)]:
            return found
        raise DataError(f"{self.files} holds no *{self.suffix} files")

    def scan(self, file: Path) -> Iterator[Scanned]:
        """A file that ends too early gives what it holds, and one entry more that says so."""
        for key, found, offset, nbytes in (_scan_parquet if is_parquet(file.name) else _scan_tar)(file, self.question):
            yield f"{file.name.removesuffix(self.suffix)}/{key}" if key else file.name, found, offset, nbytes

    def read(self, name: str) -> Iterator[tuple[str, Sample | SampleError]]:
        keys = Keys()
        with local_file(self.files / name) as file:
            for number, (key, found, _, _) in enumerate(self.scan(file)):
                key_here = keys.make(key, number)
                if isinstance(found, Sample):
                    found = Sample(key_here, found.messages, found.pictures, found.source or key)
                yield key_here, found


@dataclass(frozen=True)
class WebDatasetSource(StoredSource):
    """WebDataset tars in the folder `files`; a bare caption in them is the answer to `question`."""

    suffix = ".tar"


@dataclass(frozen=True)
class ParquetSource(StoredSource):
    """Parquet files, as Hugging Face's, in the folder `files`; a bare caption in them is the answer to `question`."""

    suffix = ".parquet"


def _scan_tar(file: Path, question: str) -> Iterator[Scanned]:
    with file.open("rb") as stream:
        for key, start, end in _members(file):
            if not key:
                yield "", SampleError(DAMAGED, f"{file.name} cannot be read behind byte {start}"), start, 0
                continue
            stream.seek(start)
            try:
                found: Sample | SampleError = read_sample(stream.read(end - start), question)
            except SampleError as error:
                found = error
            yield key, found, start, end - start


def _members(file: Path) -> Iterator[tuple[str, int, int]]:
    """Key, start and end of each sample's members; an empty key with the place from which on the file is damaged."""
    key, start, end, size = "", 0, 0, file.stat().st_size
    try:
        with tarfile.open(file, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                name = split_name(member.name)[0]
                if name != key:
                    if key:
                        yield key, start, end
                    key, start = name, member.offset
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if end > size:
                    raise tarfile.ReadError
    except Exception:  # on hostile bytes tarfile raises nearly anything
        yield "", start, 0
        return
    if key:
        yield key, start, end
    if size % tarfile.BLOCKSIZE:
        yield "", end, 0


def _scan_parquet(file: Path, question: str) -> Iterator[Scanned]:
    number = 0
    try:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            first, rows = read_rows(parquet, range(number, number + parquet.metadata.row_group(group).num_rows))
            for number in range(first, first + rows.num_rows):
                try:
                    found: Sample | SampleError = parquet_sample(rows, first, number, question)
                except SampleError as error:
                    found = error
                yield str(number), found, number, 1
            number = first + rows.num_rows
    except (OSError, pa.ArrowException) as error:
        yield "", SampleError(DAMAGED, f"{file.name} cannot be read behind row {number}: {error}"), number, 0
