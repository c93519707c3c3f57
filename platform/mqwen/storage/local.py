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
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

import pyarrow.fs as pafs

from mqwen.storage.errors import StorageError
from mqwen.storage.location import Location

FILES_AT_ONCE = 4
PARTIAL = ".partial-"  # starts the name of what is not whole; one that a dead process left is deleted later


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

    Until then `target` stays as it was, also where the process dies in the block. Then the file named `last` is taken
    away first and put there last: who finds it finds all of them. Raises StorageError, before anything, where `target`
    holds files without one of that name, or folders: they are something else.
    """
    names, there = [name for name in target.names() if not name.startswith(PARTIAL)], target.sizes().keys()
    if names and (last not in there or len(names) > len(there)):
        raise StorageError(f"{target} holds other files ({', '.join(names[:3])}); choose another place")
    local = isinstance(target.filesystem, pafs.LocalFileSystem)
    with _made(Path(target.path)) if local else tempfile.TemporaryDirectory(prefix="mqwen-") as beside:
        yield Path(beside)
        files = {path.name: path for path in Path(beside).iterdir()}
        (target / last).delete()
        for name in set(target.names()) - files.keys() - {Path(beside).name}:
            (target / name).delete()
        for name in sorted(files, key=lambda name: name == last):
            if local:
                files[name].replace(Path(target.path) / name)
            else:
                (target / name).upload(files[name])


@contextmanager
def _made(folder: Path) -> Iterator[str]:
    """A folder inside of one that is made if missing: on its filesystem files move at once, mount points included."""
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as inside:
            yield inside
    except BaseException:
        if new:
            with suppress(OSError):
                folder.rmdir()  # it stays where somebody else has put something there
        raise


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
