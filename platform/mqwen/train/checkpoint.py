"""Checkpoints as they lie in a run's folder: found, verified, read. saver.py writes them.

    RUN/checkpoints/step-00000100/checkpoint.json    the commit: progress, settings, loss, every file's size and hash
    RUN/checkpoints/step-00000100/__0_0.distcp ...   what torch.distributed.checkpoint wrote, each rank its part

A folder without checkpoint.json is half of a checkpoint and is never chosen. There is no state of random generators to
keep: every row's dropout is seeded by `settings.seed` and its place (loop.py).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from mqwen.errors import UserError
from mqwen.storage import Location, MissingFileError, retried, workplace
from mqwen.train.loop import Progress

FORMAT_VERSION = 2
COMMIT = "checkpoint.json"
FOLDER = "checkpoints"


class CheckpointError(UserError):
    """A checkpoint cannot be read or written; the message names checkpoint and file and says what to do."""


class DamagedError(CheckpointError):
    """A file of a checkpoint is not what was written."""


class FormatError(Exception):
    """A commit of another format; which one is all that is known of it."""


@dataclass(frozen=True)
class Commit:
    """What checkpoint.json holds. `loss` is the mean over the steps since the checkpoint before."""

    progress: Progress
    settings: dict[str, Any]
    files: dict[str, dict[str, Any]]
    loss: float | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, data: bytes) -> Commit:
        """Raises ValueError, KeyError or TypeError where they are none."""
        raw = json.loads(data)
        if (version := raw["format_version"]) != FORMAT_VERSION:
            raise FormatError(version)
        place = raw["progress"].pop("place")
        raw["progress"].setdefault("epochs", float(place[0]) if place else 0.0)  # earlier versions wrote none
        return cls(**raw | {"progress": Progress(**raw["progress"], place=tuple(place) if place else None)})

    def written(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def folder(run: Location) -> Location:
    return run / FOLDER


def step_folder(run: Location, step: int) -> Location:
    return folder(run) / f"step-{step:08d}"


def step_of(checkpoint: Location) -> int:
    """By its name: also of one whose commit is damaged."""
    return int(checkpoint.name.removeprefix("step-"))


def committed(run: Location) -> list[Location]:
    """The run's checkpoints, oldest first."""
    places = [folder(run) / name for name in retried(folder(run).names)]
    return [place for place in places if retried((place / COMMIT).exists)]


def progress(run: Location) -> Progress:
    """How far the newest checkpoint has come whose commit can be read."""
    for checkpoint in reversed(committed(run)):
        with suppress(DamagedError):
            return read_commit(checkpoint).progress
    return Progress()


def read_commit(checkpoint: Location) -> Commit:
    """What a checkpoint holds.

    Raises DamagedError where a file is missing or has a wrong size, CheckpointError where it is none, or of a newer
    format.
    """
    try:
        commit = Commit.read(retried((checkpoint / COMMIT).read_bytes))
    except MissingFileError as error:
        raise CheckpointError(f"{checkpoint} is no committed checkpoint: it has no {COMMIT}") from error
    except FormatError as error:
        raise CheckpointError(f"{checkpoint} has format version {error}, this code reads {FORMAT_VERSION}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{checkpoint / COMMIT} is damaged ({error}); use another checkpoint") from error
    sizes = retried(checkpoint.sizes)
    for name, entry in commit.files.items():
        size = sizes.get(name)
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DamagedError(f"{checkpoint / name} {found}, {entry['bytes']} were written; use another checkpoint")
    return commit


def load(checkpoint: Location, state: dict[str, Any]) -> Commit:
    """Fills `state` in place, in one process or in each rank of many; each checks the hashes of the files it reads.

    Raises DamagedError on every rank where one finds a damaged file.
    """
    commit = read_commit(checkpoint)
    with workplace(checkpoint) as local, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # in export, as it should be
        reader = _CheckedReader(checkpoint, commit, local)
        reader.fetch(".metadata")
        try:
            dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
        except CheckpointException as error:  # no Exception; it holds each rank's
            raise next(iter(error.failures.values()))[0] from error
    return commit


def resume(run: Location, state: dict[str, Any]) -> Progress:
    """Fills `state` from the newest checkpoint that is whole, and says which were not. Every rank calls it.

    Raises CheckpointError where none is; nothing is deleted.
    """
    found = committed(run)
    for checkpoint in reversed(found):
        try:
            return load(checkpoint, state).progress
        except DamagedError as error:
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(f"warning: {error}; trying the checkpoint before it", flush=True)
    raise CheckpointError(
        f"all {len(found)} checkpoints of {run} are damaged, nothing was deleted: restore one of them from a copy, "
        "or give another --name to start from the beginning"
    )


class _CheckedReader(dcp.FileSystemReader):
    """Only the files that this rank needs are copied here, and none is read before its hash is found right."""

    def __init__(self, checkpoint: Location, commit: Commit, local: Path) -> None:
        super().__init__(local)
        self._checkpoint, self._commit, self._local = checkpoint, commit, local

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for name in sorted({self.storage_data[item.storage_index].relative_path for item in plan.items}):
            self.fetch(name)
        return super().read_data(plan, planner)

    def fetch(self, name: str) -> None:
        file, source = self._local / name, self._checkpoint / name
        if not isinstance(source.filesystem, pafs.LocalFileSystem):
            retried(lambda: source.download(file))
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self._commit.files[name]["sha256"]:
            raise DamagedError(f"{source} is damaged: its SHA-256 is not the one that was written")
