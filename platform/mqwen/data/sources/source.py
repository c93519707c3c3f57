"""What ingest asks of a source of samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mqwen.data.errors import SampleError
from mqwen.data.sample import Sample
from mqwen.storage import Location


class Source(Protocol):
    """Where samples come from: a list of chunks, each read by one task. Chunks are made of what JSON knows."""

    def chunks(self, size: int) -> list[Any]:
        """Chunks of `size` samples, or of what lies in one file. Raises DataError where the source cannot be used."""
        ...

    def read(self, chunk: Any) -> Iterator[tuple[str, Sample | SampleError]]:
        """Each sample, or what is wrong with it, with the key that it shall have in the dataset."""
        ...


@runtime_checkable
class InPlace(Source, Protocol):
    """A source whose chunks are files of a folder that training can read as they lie there."""

    files: Location
    question: str

    def scan(self, file: Path) -> Iterator[tuple[str, Sample | SampleError, int, int]]:
        """As `read`, of a chunk's file on this machine, with offset and bytes of the sample in it: what the index says
        of its place."""
        ...
