"""Folders of files for libraries that know only local ones: artifacts and vocabularies, wherever they lie."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePath

import pyarrow.fs as pafs

from mqwen.storage.errors import StorageError
from mqwen.storage.location import Location

FILES_AT_ONCE = 4


def local_folder(location: Location, without: str = "", needs: str = "") -> Path:
    """The files that lie directly at `location`, in a folder of this machine; files matching `without` may lack.

    That is the folder itself, or a copy in ~/.cache/mqwen: made by the first process that asks and used by all, until
    a file there has another ETag. Raises StorageError where nothing is there, or no file named `needs`.
    """
    if needs and not (location / needs).size():
        raise StorageError(f"{location} holds no {needs}; give a folder with that file")
    if isinstance(location.filesystem, pafs.LocalFileSystem):
        return Path(location.path)
    files = _versions(location, without)
    if not files:
        raise StorageError(f"{location} holds no files")
    home = _cache() / _digest(location.uri, without)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    copy = home / _digest(files)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others that want the same wait for it
        if not copy.is_dir():
            _clear(home)
            partial = Path(tempfile.mkdtemp(prefix="partial-", dir=home))
            with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
                list(pool.map(lambda name: (location / name).download(partial / name), files))
            if _versions(location, without) != files:
                raise StorageError(f"{location} was changed while it was copied; try again")
            partial.rename(copy)
    return copy


def _versions(location: Location, without: str) -> dict[str, str]:
    """The ETag of each file."""
    names = [name for name in location.names() if not (without and PurePath(name).match(without))]
    return {name: etag for name in names if (etag := (location / name).etag()) is not None}


def _clear(home: Path) -> None:
    """Deletes what broke off, and copies older than the last one, which somebody may be reading still."""
    folders = sorted((path for path in home.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    whole = [path for path in folders if not path.name.startswith("partial-")]
    for path in folders:
        if path not in whole[-1:]:
            shutil.rmtree(path)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mqwen"


def _digest(*what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


@contextmanager
def filled(target: Location, last: str) -> Iterator[Path]:
    """A folder of this machine to be filled; what it holds when the block ends without an error is what `target` holds.

    The file named `last` is there last, and is taken away first where `target` held another one: who finds it finds
    all of them. A local target is filled in place. Raises StorageError, before anything, where `target` holds files
    without one of that name, or folders: they are something else.
    """
    names, there = target.names(), target.sizes().keys()
    if names and (last not in there or len(names) > len(there)):
        raise StorageError(f"{target} holds other files ({', '.join(names[:3])}); choose another place")
    if isinstance(target.filesystem, pafs.LocalFileSystem):
        yield Path(target.path)
        return
    with tempfile.TemporaryDirectory(prefix="mqwen-") as local:
        yield Path(local)
        files = {path.name: path for path in Path(local).iterdir()}
        (target / last).delete()
        for name in there - files.keys():
            (target / name).delete()
        for name in sorted(files, key=lambda name: name == last):
            (target / name).upload(files[name])


@contextmanager
def workplace(folder: Location) -> Iterator[Path]:
    """The folder itself if it is one of this machine, else an empty one of this machine for the time of the block."""
    if isinstance(folder.filesystem, pafs.LocalFileSystem):
        yield Path(folder.path)
        return
    with tempfile.TemporaryDirectory(prefix="mqwen-") as local:
        yield Path(local)


@contextmanager
def local_file(location: Location) -> Iterator[Path]:
    """A file of this machine with what lies at `location`: that file itself, or a copy for the time of the block."""
    if isinstance(location.filesystem, pafs.LocalFileSystem):
        yield Path(location.path)
        return
    with tempfile.TemporaryDirectory(prefix="mqwen-") as folder:
        location.download(Path(folder) / location.name)
        yield Path(folder) / location.name
