"""One URI to one filesystem: a folder, file:// or s3:// for data, checkpoints and artifacts alike."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pyarrow.fs as pafs


class StorageError(Exception):
    """Something in storage is missing or cannot be read; the message names it and the way out."""


@dataclass(frozen=True)
class Location:
    """A place on a filesystem. `location / "name"` is a place inside it. Travels between processes by pickle."""

    filesystem: pafs.FileSystem = field(compare=False)
    path: str
    uri: str

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}", f"{self.uri.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def size(self) -> int | None:
        """Bytes of a file, or None where there is no file."""
        info = self.filesystem.get_file_info(self.path)
        return info.size if info.type == pafs.FileType.File else None

    def exists(self) -> bool:
        return self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound

    def names(self) -> list[str]:
        """Names of what lies directly inside, sorted; empty where there is no such folder."""
        found = self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found)

    def read_bytes(self) -> bytes:
        try:
            with self.filesystem.open_input_stream(self.path) as stream:
                return stream.read()
        except FileNotFoundError as error:
            raise StorageError(f"{self} does not exist") from error

    def read_range(self, start: int, length: int) -> bytes:
        """`length` bytes from offset `start`; fewer means a truncated file and is an error."""
        try:
            with self.filesystem.open_input_file(self.path) as file:
                data = file.read_at(length, start)
        except FileNotFoundError as error:
            raise StorageError(f"{self} does not exist") from error
        if len(data) != length:
            raise StorageError(f"{self}: asked for {length} bytes at {start}, the file ends after {len(data)} of them")
        return data

    def write_bytes(self, data: bytes) -> None:
        """Writes the whole file or nothing: readers never see a part of it."""
        with self.replace() as stream:
            stream.write(data)

    @contextmanager
    def replace(self) -> Iterator[IO[bytes]]:
        """A stream whose bytes appear under this name only when the block ends without an error."""
        parent = self.path.rsplit("/", 1)[0]
        self.filesystem.create_dir(parent, recursive=True)
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            partial = f"{self.path}.partial"
            with self.filesystem.open_output_stream(partial) as stream:
                yield stream
            self.filesystem.move(partial, self.path)
        else:  # an object store shows an object when its upload completes
            with self.filesystem.open_output_stream(self.path) as stream:
                yield stream

    def upload(self, file: Path) -> None:
        """Copies a local file here."""
        with file.open("rb") as source, self.replace() as target:
            shutil.copyfileobj(source, target, 1 << 22)

    def download(self, file: Path) -> None:
        """Copies this file to a local one."""
        with self.filesystem.open_input_stream(self.path) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        with self.filesystem.open_input_stream(self.path) as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()

    def delete(self) -> None:
        """Deletes a file, or a folder with all inside; nothing there is no error."""
        kind = self.filesystem.get_file_info(self.path).type
        if kind == pafs.FileType.File:
            self.filesystem.delete_file(self.path)
        elif kind == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path)


def locate(uri: str | Path) -> Location:
    """The location of a folder path, a file:// or an s3:// URI.

    S3 takes its endpoint from AWS_ENDPOINT_URL and its credentials from where the AWS SDK looks for them.
    """
    text = str(uri)
    if "://" not in text:
        path = Path(text).expanduser().absolute()
        return Location(pafs.LocalFileSystem(), str(path), str(path))
    scheme = text.split("://", 1)[0]
    if scheme not in ("file", "s3"):
        raise StorageError(f"{text}: storage {scheme}:// is unknown; a folder, file:// or s3:// is allowed")
    filesystem, path = pafs.FileSystem.from_uri(text)
    return Location(filesystem, path, text)
