"""A place on a filesystem, and the files there: whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

import pyarrow as pa
import pyarrow.fs as pafs

from mqwen.storage.errors import MissingFileError, StorageError, TruncatedFileError
from mqwen.storage.s3 import connect, find_settings

COPIED_AT_ONCE = 1 << 22  # bytes
IMPOSSIBLE_NAME = (pa.ArrowInvalid, UnicodeEncodeError)  # what Arrow raises for a name that no file can have


@dataclass(frozen=True)
class Location:
    """A place on a filesystem. `location / "name"` is a place inside it. Travels between processes by pickle.

    Every method raises StorageError, or one of its kinds, where storage fails.
    """

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

    def is_inside(self, other: Location) -> bool:
        """Whether it is `other`, or lies at any depth inside of it; symbolic links are followed."""
        if type(self.filesystem) is not type(other.filesystem):
            return False
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            return Path(self.path).resolve().is_relative_to(Path(other.path).resolve())
        return PurePosixPath(self.path).is_relative_to(other.path)

    def size(self) -> int | None:
        """Bytes of a file, or None where there is no file."""
        info = self._info()
        return info.size if info.type == pafs.FileType.File else None

    def etag(self) -> str | None:
        """What changes when a file does, without reading it; None where there is no file."""
        try:
            with self._errors_named("read"), self.filesystem.open_input_stream(self.path) as stream:
                found = (stream.metadata() or {}).get("ETag", b"").decode()
        except MissingFileError:
            return None
        return found or str(self._info().mtime_ns)

    def exists(self) -> bool:
        return self._info().type != pafs.FileType.NotFound

    def names(self) -> list[str]:
        """Names of what lies directly inside, sorted; empty where there is no such folder."""
        return sorted(info.base_name for info in self._inside())

    def sizes(self) -> dict[str, int]:
        """Bytes of each file directly inside, from one listing."""
        return {info.base_name: info.size for info in self._inside() if info.type == pafs.FileType.File}

    def _inside(self) -> list[pafs.FileInfo]:
        with self._errors_named("listed"):
            return self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))

    def read_bytes(self) -> bytes:
        with self._errors_named("read"), self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def read_range(self, start: int, length: int) -> bytes:
        """`length` bytes from offset `start`. Raises TruncatedFileError where the file ends before them."""
        with self._errors_named("read"), self.filesystem.open_input_file(self.path) as file:
            there = max(0, min(length, file.size() - start))
            data = file.read_at(there, start) if there else b""
            if len(data) != there:  # a connection that ended early is no file that does
                raise OSError(f"{len(data)} of {there} bytes from {start} on came")
        if there != length:
            raise TruncatedFileError(
                f"{self}: asked for {length} bytes from {start} on, the file ends after {len(data)} of them", data
            )
        return data

    @contextmanager
    def opened(self) -> Iterator[pa.NativeFile]:
        """The file, open for reading at any offset, for a block that may raise OSError where its bytes cannot be read.

        Raises StorageError where the file cannot be opened.
        """
        with self._errors_named("read"):
            file = self.filesystem.open_input_file(self.path)
        with file:
            yield file

    def write_bytes(self, data: bytes) -> None:
        """Writes the whole file or nothing: readers never see a part of it."""
        with self.replace() as stream:
            stream.write(data)

    @contextmanager
    def replace(self) -> Iterator[IO[bytes]]:
        """A stream whose bytes appear under this name, all at once, when the block ends without an error."""
        with self._errors_named("written"):
            if isinstance(self.filesystem, pafs.LocalFileSystem):
                self.filesystem.create_dir(self.path.rsplit("/", 1)[0], recursive=True)
                # A name of its own: a task that Ray runs again may write beside the one that it took for lost.
                partial = f"{self.path}.{uuid.uuid4().hex}.partial"
                try:
                    with self.filesystem.open_output_stream(partial) as stream:
                        yield stream
                    self.filesystem.move(partial, self.path)
                except BaseException:
                    with suppress(OSError):
                        self.filesystem.delete_file(partial)
                    raise
            else:
                # An object appears when its upload ends, and Arrow cannot abandon one: it starts once all is here.
                with tempfile.TemporaryFile() as whole:
                    yield whole
                    whole.seek(0)
                    with self.filesystem.open_output_stream(self.path) as stream:
                        shutil.copyfileobj(whole, stream, COPIED_AT_ONCE)

    def upload(self, file: Path) -> None:
        """Copies a local file here."""
        with file.open("rb") as source, self.replace() as target:
            shutil.copyfileobj(source, target, COPIED_AT_ONCE)

    def download(self, file: Path) -> None:
        """Copies this file to a local one."""
        with (
            self._errors_named("read"),
            self.filesystem.open_input_stream(self.path) as source,
            file.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, COPIED_AT_ONCE)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        with self._errors_named("read"), self.filesystem.open_input_stream(self.path) as stream:
            while chunk := stream.read(COPIED_AT_ONCE):
                digest.update(chunk)
        return digest.hexdigest()

    def delete(self) -> None:
        """Deletes a file, or a folder with all inside; nothing there is no error."""
        kind = self._info().type
        with self._errors_named("deleted"):
            if kind == pafs.FileType.File:
                self.filesystem.delete_file(self.path)
            elif kind == pafs.FileType.Directory:
                self.filesystem.delete_dir(self.path)

    def _info(self) -> pafs.FileInfo:
        with self._errors_named("read"):
            return self.filesystem.get_file_info(self.path)

    @contextmanager
    def _errors_named(self, done: str) -> Iterator[None]:
        try:
            yield
        except (OSError, *IMPOSSIBLE_NAME) as error:
            if done == "read" and self._is_no_file(error):
                raise MissingFileError(f"{self} does not exist or is no file") from error
            raise StorageError(f"{self} cannot be {done}: {error}") from error

    def _is_no_file(self, error: Exception) -> bool:
        if not isinstance(error, OSError) or error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return True
        try:
            return self.filesystem.get_file_info(self.path).type == pafs.FileType.Directory
        except OSError:
            return False


def locate(uri: str | Path) -> Location:
    """The location of a folder path, a file:// or an s3:// URI. Raises StorageError where it names none.

    S3 takes endpoint, region and credentials from where AWS's tools look for them; nothing is sent to it yet.
    """
    text = str(uri)
    scheme = text.split(":", 1)[0] if "://" in text else ""
    if not text or scheme not in ("", "file", "s3"):
        raise StorageError(f"{text!r} names no storage; a folder, file:// or s3:// is allowed")
    if not scheme:
        path = str(Path(text).expanduser().absolute())
        return Location(pafs.LocalFileSystem(), path, path)
    try:
        path = pafs.FileSystem.from_uri(text)[1] if scheme == "file" else text.removeprefix("s3://")
    except (OSError, pa.ArrowInvalid) as error:
        raise StorageError(f"{text!r} cannot be reached: {error}") from error
    if not path.strip("/"):
        raise StorageError(f"{text!r} names no place; a folder's path or s3://BUCKET/NAME is allowed")
    if scheme == "file":
        return Location(pafs.LocalFileSystem(), path, text)
    path = path.strip("/")
    return Location(connect(find_settings()), path, f"s3://{path}")
