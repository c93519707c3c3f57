"""What each training worker does: data, model, strategy, checkpoint, loop. Ray Train starts one on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from mqwen.errors import LastingError
from mqwen.model import MQWenConfig
from mqwen.storage import Location, retried
from mqwen.telemetry import training
from mqwen.train import checkpoint, spares
from mqwen.train.build import build_model
from mqwen.train.cost import Cost
from mqwen.train.emit import emit_checkpoint
from mqwen.train.guard import RECENT, Guard
from mqwen.train.hardware import ceiling
from mqwen.train.loop import Batch, Data, Evaluation, Progress, StepRecord, Watch, train
from mqwen.train.metrics import Metrics
from mqwen.train.preemption import Notice
from mqwen.train.profile import StepProfiler
from mqwen.train.records import read_metrics
from mqwen.train.saver import Saver
from mqwen.train.settings import RunSettings
from mqwen.train.strategy import make_strategy
from mqwen.train.watchdog import Watchdog

ENDED = "ended.txt"  # of the run's folder

Split = Callable[[Progress, int], list[Any]]
"""Given the progress to start from and the number of workers: what each of them reads its rows from."""
Rows = Callable[[Any, Progress], Iterator[Batch]]
"""Given one of those and the progress: this rank's rows. It asks for the first at once, beside its caller."""


@dataclass(frozen=True)
class Feed:
    """Where every worker finds its rows.

    `held_out` are those of a rank of so many, from the beginning; None is none. `environment` are variables that
    reading needs on a worker, `readers` those that its tasks' processes have beside.
    """

    split: Split
    rows: Rows
    blank: Batch
    held_out: Callable[[int, int], Iterator[Batch]] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    readers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOutRows:
    """A rank's held-out rows, as often as they are iterated."""

    share: Callable[[int, int], Iterator[Batch]]
    rank: int
    workers: int

    def __iter__(self) -> Iterator[Batch]:
        return self.share(self.rank, self.workers)


@dataclass(frozen=True)
class Task:
    """What the driver sends to every worker. `source` holds the weights to start from, None makes fresh ones.

    The job `started` at a Unix time, when checkpoints held `productive` seconds of steps.
    """

    settings: RunSettings
    run: Location
    config: MQWenConfig
    source: Location | None
    feed: Feed
    cost: Cost
    started: float
    productive: float


def work(config: dict[str, Task]) -> None:
    """What each worker runs. Ray starts all of them anew whatever one raises: after an error that would come again they
    have nothing left to do, and the driver says why, which it finds in ENDED."""
    task = config["task"]
    ended = task.run / ENDED
    if retried(ended.exists):
        return
    try:
        _train(task)
    except LastingError as error:
        reason = f"{type(error).__name__}: {error}".encode()
        retried(lambda: ended.write_bytes(reason))
        raise


def _train(task: Task) -> None:
    settings, rank, workers = task.settings, dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(settings.parallel.cpus_per_worker)
    if rank == 0:
        training.WORKER_GROUP_STARTS.add(run=settings.name)
    expected = checkpoint.progress(task.run)
    rows = _begin_reading(task, expected)  # beside all that comes before the first step

    device = ray.train.torch.get_device()
    model = build_model(settings, task.config, task.source).to(device)
    model.train()
    strategy = make_strategy(model, list(model.transformer.h), settings)

    progress = Progress()
    if checkpoint.committed(task.run):
        state = strategy.state()
        progress = checkpoint.resume(task.run, state)
        strategy.load_state(state)
        place = checkpoint.step_folder(task.run, progress.step)
        _say(rank, f"resumed from {place} with {workers} workers")
    if progress != expected:  # the newest was damaged
        rows = _begin_reading(task, progress)

    metrics, profiler = None, None
    if rank == 0:
        peak = ceiling(device, settings.model.precision)
        print(f"MFU is of {peak.source}, times {workers}", flush=True)
        metrics = Metrics(settings, device, peak, workers, task.started, progress.seconds - task.productive)
        profiler = StepProfiler(task.run, settings.profile, progress.step) if settings.profile else None
    saver = Saver(task.run, settings)
    if device.type == "cuda":
        saver.make_room(strategy.state())
    watchdog = Watchdog(task.run, rank, settings.parallel.hang_timeout)
    guard = Guard(settings.guard, settings.optimizer.clip, task.run, _recent(task.run, progress))
    notice = Notice()
    saved = progress

    def save(now: Progress) -> None:
        nonlocal saved
        started = time.perf_counter()
        loss, files = (metrics.loss, metrics.take()) if metrics else (None, {})
        saver.save(strategy.state(), now, loss, files, lambda: emit_checkpoint(settings.name, started))
        saved = now
        notice.heard()

    def accepts(step: int, loss: float, keys: Callable[[], list[str]], norm: float) -> bool:
        saver.wait_for_copy()  # next the state changes
        return guard.accepts(step, loss, keys, norm)

    def on_step(record: StepRecord) -> None:
        if settings.parallel.spares and record.step == progress.step + 1:  # which does not wait for them
            spares.ask()
        saver.check()
        if metrics:
            metrics.step(record)
        if profiler:
            profiler.step()

    def on_evaluation(evaluation: Evaluation) -> None:
        if metrics:
            metrics.evaluation(evaluation)

    def on_checkpoint(now: Progress) -> None:
        if saver.busy():
            _say(rank, f"step {now.step}: no checkpoint, that of step {saved.step} is still being written")
        else:
            save(now)

    feed = task.feed
    held_out = HeldOutRows(feed.held_out, rank, workers) if feed.held_out else ()
    data = Data(rows, feed.blank, held_out, task.cost.of)
    watch = Watch(on_step, on_checkpoint, on_evaluation, accepts, notice.given, watchdog.alive)
    with watchdog.watching():
        last = train(settings, strategy, data, progress, watch)
    saver.wait()
    if saved.step != last.step:  # left out, as the one before was not written yet
        save(last)
        saver.wait()
    for name, content in metrics.take().items() if metrics else ():  # an evaluation after the last checkpoint
        retried(partial((task.run / name).write_bytes, content))


def _begin_reading(task: Task, progress: Progress) -> Iterator[Batch]:
    """This rank's rows from a progress on. The first is read while the caller does other things."""
    parts: list[Any] = [None] * dist.get_world_size()
    if dist.get_rank() == 0:
        parts = task.feed.split(progress, len(parts))
    dist.broadcast_object_list(parts, device=torch.device("cpu"))
    return task.feed.rows(parts[dist.get_rank()], progress)


def _recent(run: Location, progress: Progress) -> list[tuple[float, float]]:
    """Loss and gradient norm of the last steps up to a progress."""
    records = read_metrics(run, upto=progress.step, last=2 * RECENT) if progress.step else []
    return [(record["loss"], record["gradient_norm"]) for record in records]


def _say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)
