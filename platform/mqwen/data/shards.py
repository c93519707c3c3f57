"""Shards as they are written: samples into tars, a new one when one is full."""

from __future__ import annotations

import hashlib
import tarfile
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Any

from mqwen.data.sample import Sample, write_sample
from mqwen.storage import Location


class ShardWriter:
    """Writes DATASET/NAME.tar, NAME-1.tar, ..., each with `samples` samples at most, and ended by the one that brings
    it to `nbytes`. `shards` says of each its name, file, size and hash; it is complete after the block."""

    def __init__(self, dataset: Location, name: str, samples: int, nbytes: int) -> None:
        self._dataset, self._name, self._most_samples, self._most_bytes = dataset, name, samples, nbytes
        self._open, self._samples = ExitStack(), 0
        self.shards: list[dict[str, Any]] = []

    def add(self, sample: Sample) -> dict[str, Any]:
        """Where the sample lies now: shard, offset and nbytes."""
        if not self.shards or self._samples == self._most_samples or self._stream.tell() >= self._most_bytes:
            self._close()
            self._next()
        start = self._stream.tell()
        write_sample(self._tar, sample)
        self._samples += 1
        return {"shard": self.shards[-1]["name"], "offset": start, "nbytes": self._stream.tell() - start}

    def _next(self) -> None:
        name = self._name + (f"-{len(self.shards)}" if self.shards else "")
        file = f"{name}.tar"
        self._stream = _Counted(self._open.enter_context((self._dataset / file).replace()))
        self._tar = self._open.enter_context(
            tarfile.TarFile(fileobj=self._stream, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]
        )
        self._samples = 0
        self.shards.append({"name": name, "file": file})

    def _close(self) -> None:
        if self.shards:
            self._open.close()
            self.shards[-1] |= {"nbytes": self._stream.tell(), "sha256": self._stream.digest.hexdigest()}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close()
        else:
            self._open.__exit__(kind, error, trace)


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
