"""What each training worker does: model, strategy, checkpoint, data, loop. Ray Train starts one on every rank."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import ray.train
import ray.train.torch
import torch

from mqwen.model import MQWenConfig
from mqwen.storage import Location
from mqwen.train import checkpoint
from mqwen.train.build import build_model
from mqwen.train.emit import emit_checkpoint, emit_step
from mqwen.train.loop import Batch, Progress, StepRecord, train
from mqwen.train.settings import RunSettings
from mqwen.train.strategy import STRATEGIES

Rows = Callable[[Any, Progress], Iterator[Batch]]
"""Given Ray's iterator and the progress to start from: this rank's rows."""


@dataclass(frozen=True)
class Task:
    """What the driver sends to every worker."""

    settings: RunSettings
    run: Location
    config: MQWenConfig
    rows: Rows
    blank: Batch


def work(config: dict[str, Task]) -> None:
    task = config["task"]
    settings, rank = task.settings, ray.train.get_context().get_world_rank()
    torch.set_num_threads(settings.parallel.cpus_per_worker)
    # It would report each rank's share of each checkpoint.
    logging.getLogger("ray.train.v2._internal.execution.context").setLevel(logging.WARNING)
    device = ray.train.torch.get_device()

    model = build_model(settings, task.config).to(device)
    model.train()
    shard = STRATEGIES[settings.parallel.strategy]
    strategy = shard(model, list(model.transformer.h), settings.parallel, settings.optimizer)

    progress = Progress()
    if latest := checkpoint.latest(task.run):
        state = strategy.state()
        progress = checkpoint.load(latest, state).progress
        strategy.load_state(state)
        _say(rank, f"resumed from {latest}")

    rows = task.rows(ray.train.get_dataset_shard("train"), progress)
    metrics = _Metrics(task.run, settings, rank)

    def on_step(record: StepRecord) -> None:
        metrics.add(record)
        if rank == 0:
            emit_step(settings.name, record)

    def on_checkpoint(now: Progress) -> None:
        started = time.perf_counter()
        metrics.write()  # first: of a committed step the metrics are there
        target = checkpoint.save(task.run, strategy.state(), now, settings)
        if rank == 0:
            emit_checkpoint(settings.name, time.perf_counter() - started)
        saved = ray.train.Checkpoint(target.path, target.filesystem)
        mode = ray.train.CheckpointUploadMode.NO_UPLOAD  # it is there already, committed
        ray.train.report(metrics.last, checkpoint=saved, checkpoint_upload_mode=mode)
        _say(rank, f"step {now.step}: checkpoint {target}")

    train(settings, strategy, rows, task.blank, progress, on_step, on_checkpoint)


class _Metrics:
    """The records of the steps since the last checkpoint. With it they become a file of the run, so that the run's
    metrics are those of the steps that count, whatever was lost on the way."""

    def __init__(self, run: Location, settings: RunSettings, rank: int) -> None:
        self._run, self._settings, self._rank = run, settings, rank
        self._records: list[StepRecord] = []
        self.last: dict[str, float] = {}

    def add(self, record: StepRecord) -> None:
        self._records.append(record)
        self.last = asdict(record)
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

    def write(self) -> None:
        if self._rank == 0 and self._records:
            lines = "".join(json.dumps(asdict(record)) + "\n" for record in self._records)
            (self._run / "metrics" / f"step-{self._records[0].step:08d}.jsonl").write_bytes(lines.encode())
        self._records = []


def _say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)
