"""Checkpoints: written beside the training, committed by one last write, checked when read.

    RUN/checkpoints/step-000100/checkpoint.json    the commit: step, place, settings, every file's size and SHA-256
    RUN/checkpoints/step-000100/__0_0.distcp ...   what torch.distributed.checkpoint wrote, each rank its part

A folder without checkpoint.json is half of a checkpoint and is never chosen.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from mqwen.errors import UserError
from mqwen.storage import Location, MissingFileError, locate
from mqwen.train.loop import Progress
from mqwen.train.settings import RunSettings

FORMAT_VERSION = 1
COMMIT = "checkpoint.json"
FOLDER = "checkpoints"


class CheckpointError(UserError):
    """A checkpoint cannot be read; the message names checkpoint and file and says what to do."""


@dataclass(frozen=True)
class Commit:
    """What checkpoint.json holds."""

    step: int
    place: tuple[int, int, int] | None
    settings: dict[str, Any]
    files: dict[str, dict[str, Any]]
    format_version: int = FORMAT_VERSION

    @property
    def progress(self) -> Progress:
        return Progress(self.step, tuple(self.place) if self.place else None)  # type: ignore[arg-type]


def folder(run: Location) -> Location:
    return run / FOLDER


def save(run: Location, state: dict[str, Any], progress: Progress, settings: RunSettings) -> Location:
    """Writes and commits a checkpoint. Every rank calls it; every rank returns when it is committed."""
    target = folder(run) / f"step-{progress.step:08d}"
    with tempfile.TemporaryDirectory(prefix="mqwen-checkpoint-") as local:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(local))
        mine = {}
        for file in Path(local).iterdir():
            mine[file.name] = {"bytes": file.stat().st_size, "sha256": locate(file).sha256()}
            (target / file.name).upload(file)
    tables: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(tables, mine)
    if dist.get_rank() == 0:
        files = {name: entry for table in tables for name, entry in table.items()}
        commit = Commit(progress.step, progress.place, asdict(settings), files)
        (target / COMMIT).write_bytes(json.dumps(asdict(commit), indent=1).encode())
        for old in committed(run)[: -settings.checkpoint.keep]:
            (old / COMMIT).delete()  # first, so that what is left of a broken deletion is never chosen
            old.delete()
    dist.barrier()
    return target


def committed(run: Location) -> list[Location]:
    """The run's checkpoints, oldest first."""
    return [folder(run) / name for name in folder(run).names() if (folder(run) / name / COMMIT).exists()]


def latest(run: Location) -> Location | None:
    """The newest checkpoint, or None where there is none yet."""
    return next(reversed(committed(run)), None)


def progress(run: Location) -> Progress:
    """How far the newest checkpoint has come."""
    newest = latest(run)
    return read_commit(newest).progress if newest else Progress()


def read_commit(checkpoint: Location) -> Commit:
    """What a checkpoint holds. Raises CheckpointError where it is none, or a file is missing or has a wrong size."""
    try:
        raw = json.loads((checkpoint / COMMIT).read_bytes())
        if (version := raw["format_version"]) != FORMAT_VERSION:
            raise CheckpointError(f"{checkpoint} has format version {version}, this code reads {FORMAT_VERSION}")
        commit = Commit(**raw)
    except MissingFileError as error:
        raise CheckpointError(f"{checkpoint} is no committed checkpoint: it has no {COMMIT}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / COMMIT} is damaged ({error}); use another checkpoint") from error
    sizes = checkpoint.sizes()
    for name, entry in commit.files.items():
        size = sizes.get(name)
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{checkpoint / name} {found}, {entry['bytes']} were written; use another checkpoint")
    return commit


def load(checkpoint: Location, state: dict[str, Any]) -> Commit:
    """Fills `state` in place, in one process or in each rank of many, after checking every file's hash."""
    commit = read_commit(checkpoint)
    with _local(checkpoint, commit) as local, warnings.catch_warnings():
        for name, entry in commit.files.items():
            if (locate(local) / name).sha256() != entry["sha256"]:
                raise CheckpointError(f"{checkpoint / name} is damaged: its SHA-256 is not the one that was written")
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # in export, as it should be
        dcp.load(state, storage_reader=dcp.FileSystemReader(local), no_dist=not dist.is_initialized())
    return commit


@contextmanager
def _local(checkpoint: Location, commit: Commit) -> Iterator[str]:
    """The checkpoint as a folder of this machine: where it lies, or a copy for the time of the block."""
    if isinstance(checkpoint.filesystem, pafs.LocalFileSystem):
        yield checkpoint.path
        return
    with tempfile.TemporaryDirectory(prefix="mqwen-checkpoint-") as local:
        for name in commit.files:
            (checkpoint / name).download(Path(local) / name)
        yield local
