"""What each training worker does: data, model, strategy, checkpoint, loop. Ray Train starts one on every rank."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from mqwen.model import MQWenConfig
from mqwen.storage import Location
from mqwen.telemetry import training
from mqwen.train import checkpoint
from mqwen.train.build import build_model
from mqwen.train.compute import prepare
from mqwen.train.emit import emit_checkpoint, emit_step
from mqwen.train.guard import RECENT, Guard
from mqwen.train.loop import Batch, Progress, StepRecord, train
from mqwen.train.preemption import Notice
from mqwen.train.report import read_metrics
from mqwen.train.saver import Saver
from mqwen.train.settings import RunSettings
from mqwen.train.strategy import STRATEGIES
from mqwen.train.watchdog import Watchdog

Split = Callable[[Progress, int], list[Any]]
"""Given the progress to start from and the number of workers: what each of them reads its rows from."""
Rows = Callable[[Any, Progress], Iterator[Batch]]
"""Given one of those and the progress: this rank's rows."""


@dataclass(frozen=True)
class Task:
    """What the driver sends to every worker. `source` holds the weights to start from, None makes fresh ones."""

    settings: RunSettings
    run: Location
    config: MQWenConfig
    source: Location | None
    split: Split
    rows: Rows
    blank: Batch


def work(config: dict[str, Task]) -> None:
    task = config["task"]
    settings, rank = task.settings, dist.get_rank()
    torch.set_num_threads(settings.parallel.cpus_per_worker)
    if rank == 0:
        training.WORKER_GROUP_STARTS.add(run=settings.name)
    expected = checkpoint.progress(task.run)
    rows = _begin_reading(task, expected)  # beside all that comes before the first step

    model = build_model(settings, task.config, task.source).to(ray.train.torch.get_device())
    model.train()
    shard = STRATEGIES[settings.parallel.strategy]
    prepare(model, settings.compute)
    dtype = getattr(torch, settings.model.precision)
    strategy = shard(model, list(model.transformer.h), settings.parallel, settings.optimizer, dtype)

    progress = Progress()
    if checkpoint.committed(task.run):
        state = strategy.state()
        progress = checkpoint.resume(task.run, state)
        strategy.load_state(state)
        place = checkpoint.step_folder(task.run, progress.step)
        _say(rank, f"resumed from {place} with {dist.get_world_size()} workers")
    if progress != expected:  # the newest was damaged
        rows = _begin_reading(task, progress)

    metrics, saver = _Metrics(settings, rank), Saver(task.run, settings)
    watchdog = Watchdog(task.run, rank, settings.parallel.hang_timeout)
    guard = Guard(settings.guard, task.run, _recent(task.run, progress))
    notice = Notice()
    saved = progress

    def save(now: Progress) -> None:
        nonlocal saved
        started = time.perf_counter()
        saver.save(strategy.state(), now, metrics.loss, metrics.take(), lambda: emit_checkpoint(settings.name, started))
        saved = now
        notice.heard()

    def on_step(record: StepRecord) -> None:
        watchdog.alive()
        saver.check()
        metrics.add(record)
        if rank == 0:
            emit_step(settings.name, record)

    def on_checkpoint(now: Progress) -> None:
        if saver.busy():
            _say(rank, f"step {now.step}: no checkpoint, that of step {saved.step} is still being written")
        else:
            save(now)

    with watchdog.watching():
        last = train(
            settings,
            strategy,
            rows,
            task.blank,
            progress,
            on_step,
            on_checkpoint,
            guard.accepts,
            wants_checkpoint=notice.given,
        )
    saver.wait()
    if saved.step != last.step:  # left out, as the one before was not written yet
        save(last)
        saver.wait()


def _begin_reading(task: Task, progress: Progress) -> Iterator[Batch]:
    """This rank's rows from a progress on. The first is read while the caller does other things."""
    parts: list[Any] = [None] * dist.get_world_size()
    if dist.get_rank() == 0:
        parts = task.split(progress, len(parts))
    dist.broadcast_object_list(parts, device=torch.device("cpu"))
    rows = task.rows(parts[dist.get_rank()], progress)
    reader = ThreadPoolExecutor(1)
    first = reader.submit(lambda: list(itertools.islice(rows, 1)))
    reader.shutdown(wait=False)
    return itertools.chain((row for rows in [first] for row in rows.result()), rows)


def _recent(run: Location, progress: Progress) -> list[tuple[float, float]]:
    """Loss and gradient norm of the last steps up to a progress."""
    records = [record for record in read_metrics(run) if record["step"] <= progress.step] if progress.step else []
    return [(record["loss"], record["gradient_norm"]) for record in records[-2 * RECENT :]]


class _Metrics:
    """The records of the steps since the last checkpoint. With it they become a file of the run, so that the run's
    metrics are those of the steps that count, whatever was lost on the way."""

    def __init__(self, settings: RunSettings, rank: int) -> None:
        self._settings, self._rank = settings, rank
        self._records: list[StepRecord] = []

    @property
    def loss(self) -> float:
        """The mean of the steps since the last checkpoint, but for those whose loss is no number."""
        return statistics.fmean([one.loss for one in self._records if math.isfinite(one.loss)] or [math.inf])

    def add(self, record: StepRecord) -> None:
        self._records.append(record)
        every = self._settings.log_every
        if record.step % every == 0 or record.step in (1, self._settings.steps):
            recent = self._records[-every:]
            seconds = sum(r.seconds for r in recent)
            _say(
                self._rank,
                f"step {record.step}/{self._settings.steps}  loss {record.loss:.6f}  lr {record.learning_rate:.2e}  "
                f"norm {record.gradient_norm:.3f}  {sum(r.positions for r in recent) / seconds:,.0f} positions/s  "
                f"{sum(r.images for r in recent) / seconds:,.0f} images/s  "
                f"data wait {sum(r.data_wait for r in recent) / seconds:.1%}",
            )

    def take(self) -> dict[str, bytes]:
        """The file that holds them, by its name in the run; from now on others are kept."""
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in self._records)
        name = f"metrics/step-{self._records[0].step:08d}.jsonl"
        self._records = []
        return {name: lines.encode()}


def _say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)
