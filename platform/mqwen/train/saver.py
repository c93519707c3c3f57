"""Writes checkpoints beside the training.

`save` begins a copy of this rank's part of the state, which is all that the training waits for: at once on a CPU; from
a GPU only before the state changes again, as the copy goes on beside the next forward and backward pass. A thread
writes the copy, uploads it, and when every rank's files are there rank 0 commits them by one last write. The threads of
all ranks talk through a process group of their own, so that they do not meet the training's messages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils._pytree import tree_leaves

from mqwen.errors import UserError
from mqwen.storage import Location, StorageError, locate, retried, workplace
from mqwen.train.checkpoint import COMMIT, CheckpointError, Commit, DamagedError, committed, read_commit, step_folder
from mqwen.train.loop import Progress
from mqwen.train.settings import RunSettings

UNEVEN = timedelta(minutes=30)  # how much longer one rank may write than another
SEEN = 60.0  # seconds in which a shared folder shows what another node wrote: NFS may give old lists for so long
FILES = 4  # that a rank writes at the same time


class Saver:
    """Every rank makes one and calls each method equally often."""

    def __init__(self, run: Location, settings: RunSettings) -> None:
        self._run, self._settings = run, settings
        self._patience = settings.checkpoint.patience
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._patience) + UNEVEN)
        self._rank = dist.get_rank()
        self._copier: _Copier | None = None
        self._copy: Future[Any] | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def make_room(self, state: dict[str, Any]) -> None:
        """Pins memory for a GPU's state beside the training, or else its first checkpoint would wait for that."""
        self._copy = self._begin_copy(state)

    def save(
        self,
        state: dict[str, Any],
        progress: Progress,
        loss: float | None = None,
        beside: dict[str, bytes] | None = None,
        on_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Begins a checkpoint; the one before must have ended (`busy`, `wait`). The state must not change before
        `wait_for_copy`.

        `beside` are rank 0's files of the run, by their names in it, that are to be there before the commit;
        `on_commit` is called on rank 0, in the thread.
        """
        self.wait()
        copied = self._copy = self._begin_copy(state)

        def run() -> None:
            try:
                self._write(copied.result(), progress, loss, beside or {})
                if self._rank == 0:
                    on_commit()
            except BaseException as error:  # DCP's own is no Exception
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True, name="checkpoint")
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Until the state may change."""
        if self._copy is not None:
            wait_for([self._copy])  # what it raises is raised where it is written

    def busy(self) -> bool:
        """Whether a checkpoint is being written, or room made for one, on any rank: the same answer on all of them."""
        copying = self._copy is not None and not self._copy.done()
        writing = torch.tensor(copying or (self._thread is not None and self._thread.is_alive()), dtype=torch.int64)
        dist.all_reduce(writing, op=dist.ReduceOp.MAX)
        return bool(writing)

    def check(self) -> None:
        """Raises CheckpointError where writing failed."""
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, CheckpointException):
                error = next(iter(error.failures.values()))[0]
            raise error

    def wait(self) -> None:
        """Until nothing is being written. Raises CheckpointError where writing failed."""
        self.wait_for_copy()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _begin_copy(self, state: dict[str, Any]) -> Future[Any]:
        """A copy of the state on the CPU, which is there at once unless the state is on a GPU."""
        if not _on_gpu(state):
            copied = Future[Any]()
            copied.set_result(StateDictStager().stage(state))
            return copied
        if self._copier is None:
            self._copier = _Copier()
        return self._copier.begin(state)

    def _write(self, state: dict[str, Any], progress: Progress, loss: float | None, beside: dict[str, bytes]) -> None:
        target, limit = step_folder(self._run, progress.step), time.monotonic() + self._patience
        self._together(lambda: self._retried(lambda: _clear(target), limit) if self._rank == 0 else None)
        with workplace(target) as local:  # a folder is written in place: it counts only once committed
            # With several threads none of them waits for the GPU between its tensors, which are not there any more.
            writer = dcp.FileSystemWriter(local, thread_count=FILES)
            dcp.save(state, storage_writer=writer, process_group=self._group)
            entries = self._together(lambda: self._retried(lambda: _put(local, target, self._rank), limit))
        files = {name: entry for table in entries for name, entry in table.items()}
        commit = Commit(progress, asdict(self._settings), files, loss)

        def finish() -> None:
            _require_files(target, files)
            for name, data in beside.items():
                (self._run / name).write_bytes(data)
            (target / COMMIT).write_bytes(commit.written())

        self._together(lambda: self._retried(finish, limit) if self._rank == 0 else None)
        if self._rank == 0:
            print(f"step {progress.step}: checkpoint {target}", flush=True)
            self._remove_old()

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` gives on each rank, after all have done it. Raises on every rank what it raises on one."""
        result, problem, cause = None, None, None
        try:
            result = work()
        except Exception as error:  # whatever it is, the others must not wait for this rank
            problem, cause = str(error) if isinstance(error, UserError) else repr(error), error
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (result, problem), group=self._group)
        if problems := sorted({problem for _, problem in found if problem is not None}):
            raise CheckpointError(f"a checkpoint could not be written: {'; '.join(problems)}") from cause
        return [result for result, _ in found]

    def _retried(self, work: Callable[[], Any], limit: float) -> Any:
        """Tries again while the time lasts."""
        try:
            return retried(work, until=limit)
        except StorageError as error:
            raise StorageError(f"{error}; tried for --checkpoint.patience {self._patience:g} seconds") from error

    def _remove_old(self) -> None:
        """All but the newest and the best. What cannot be removed stays, and is tried again with the next."""
        keep = self._settings.checkpoint
        try:
            found = committed(self._run)
            kept = {one.path for one in found[-keep.keep :]}
            if keep.keep_best:
                losses = {one.path: _loss(one) for one in found}
                scored = [path for path, loss in losses.items() if loss is not None]
                kept |= set(sorted(scored, key=lambda path: losses[path] or 0.0)[: keep.keep_best])
            for old in found:
                if old.path not in kept:
                    _clear(old)
        except (StorageError, CheckpointError) as error:
            print(f"warning: an old checkpoint stays: {error}", flush=True)


def _loss(checkpoint: Location) -> float | None:
    """None of one that is damaged: it is none of the best."""
    try:
        return read_commit(checkpoint).loss
    except DamagedError as error:
        print(f"warning: {error}", flush=True)
        return None


class _Copier:
    """Copies a GPU's state beside its computations, into pinned memory that is kept for the next copy.

    torch's DefaultStager does not wait for what the state comes from, and before torch 2.13 it pins anew for each copy.
    """

    def __init__(self) -> None:
        self._stager = StateDictStager(pin_memory=True, pin_memory_min_bytes=1 << 20)  # smaller ones share pages
        self._stream = torch.cuda.Stream()
        self._thread = ThreadPoolExecutor(1, "copy")

    def begin(self, state: dict[str, Any]) -> Future[Any]:
        self._stream.wait_stream(torch.cuda.current_stream())
        return self._thread.submit(self._copy, state)

    def _copy(self, state: dict[str, Any]) -> dict[str, Any]:
        with torch.cuda.stream(self._stream):
            copy: dict[str, Any] = self._stager.stage(state, non_blocking=True)
        self._stream.synchronize()
        return copy


def _on_gpu(state: dict[str, Any]) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in tree_leaves(state))


def _put(local: Path, target: Location, rank: int) -> dict[str, dict[str, Any]]:
    """This rank's files where they belong; their sizes and hashes."""

    def put(file: Path) -> dict[str, Any]:
        entry = {"bytes": file.stat().st_size, "sha256": locate(file).sha256()}
        if not isinstance(target.filesystem, pafs.LocalFileSystem):
            (target / file.name).upload(file)
        return entry

    files = [*local.glob(f"__{rank}_*"), *([local / ".metadata"] if rank == 0 else [])]
    with ThreadPoolExecutor(FILES) as threads:
        return dict(zip([file.name for file in files], threads.map(put, files), strict=True))


def _require_files(checkpoint: Location, files: dict[str, dict[str, Any]]) -> None:
    """Raises CheckpointError where a rank's file does not lie here as it was written: a folder of this machine may be
    another one on that rank's."""
    limit = time.monotonic() + SEEN
    while True:
        sizes = checkpoint.sizes()
        lacking = sorted(name for name, entry in files.items() if sizes.get(name) != entry["bytes"])
        if not lacking:
            return
        if time.monotonic() > limit:
            raise CheckpointError(
                f"{checkpoint / lacking[0]} is not there, or not whole, though its rank wrote it: --runs must be a "
                "folder that all nodes share, or s3://BUCKET/NAME"
            )
        time.sleep(1)


def _clear(checkpoint: Location) -> None:
    (checkpoint / COMMIT).delete()  # first, so that what is left of a broken deletion is never chosen
    checkpoint.delete()
