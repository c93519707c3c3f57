"""The training loop, from top to bottom.

A step trains on a fixed run of rows of the order, whatever the number of workers: of a step's rows every rank takes
each W-th. Where W does not divide them, a rank that came short runs a blank row, because every rank must join every
collective operation of a forward and a backward pass.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from mqwen.train.optimizer import rate_factor
from mqwen.train.settings import RunSettings, SettingsError
from mqwen.train.strategy import Strategy

LOSS_ONLY = {"use_cache": False, "logits_to_keep": "labels"}  # no full logits: only labelled positions get any

Place = tuple[int, int, int]
"""A row's epoch, window and row in the order."""


class Batch(Protocol):
    """A row, ready for the model: `inputs` are forward's arguments, on the CPU (it moves
    them itself), `supervised` counts the labelled positions, `epochs` are those that are over with it."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]: ...
    @property
    def supervised(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def images(self) -> int: ...
    @property
    def place(self) -> Place: ...
    @property
    def epochs(self) -> float: ...
    @property
    def keys(self) -> list[str]: ...


Accepts = Callable[[int, float, Callable[[], list[str]], float], bool]
"""Given a step, its loss, what gives the keys of this rank's samples, and its gradient norm: whether it is to count."""


@dataclass(frozen=True)
class StepRecord:
    """What a step did, over all ranks; times in seconds, the ranks' mean. `tokens` counts labelled positions, `flops`
    the operations of the model, `spent` is the share of the budget that is gone.

    `place` is that of its last row; `learning_rates` are by the patterns that give them, "" for that of all others;
    `learning_rate` is the largest.
    """

    step: int
    place: Place
    loss: float
    learning_rate: float
    learning_rates: dict[str, float]
    gradient_norm: float
    tokens: int
    positions: int
    images: int
    flops: float
    seconds: float
    data_wait: float
    spent: float


@dataclass(frozen=True)
class Evaluation:
    """The mean loss over all labelled positions of the held-out rows, after a step; `seconds` is what it took."""

    step: int
    loss: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Steps done, the place of the last row that they trained on (None before the first), the labelled positions and
    seconds that they took; the best held-out loss so far, and how many evaluations since were no better; the epochs
    that are over with that row."""

    step: int = 0
    place: Place | None = None
    tokens: int = 0
    seconds: float = 0.0
    best: float = math.inf
    worse: int = 0
    epochs: float = 0.0


@dataclass(frozen=True)
class Data:
    """This rank's rows. `held_out` begins anew each time it is iterated. `blank` is a row without samples.

    `flops` says how many operations a row takes.
    """

    rows: Iterator[Batch]
    blank: Batch
    held_out: Iterable[Batch] = ()
    flops: Callable[[Batch], float] = lambda row: 0.0


@dataclass(frozen=True)
class Watch:
    """Who is told and asked; each is called on every rank at the same steps. `wants_checkpoint` is asked for one beside
    those that are due: it is made when any rank wants it. `alive` is called after each pass, of an evaluation too."""

    step: Callable[[StepRecord], None]
    checkpoint: Callable[[Progress], None]
    evaluation: Callable[[Evaluation], None] = lambda evaluation: None
    accepts: Accepts = lambda step, loss, keys, norm: True
    wants_checkpoint: Callable[[], bool] = lambda: False
    alive: Callable[[], None] = lambda: None


def train(settings: RunSettings, strategy: Strategy, data: Data, progress: Progress, watch: Watch) -> Progress:
    """Trains from `progress` until the budget is spent, the data ends or patience does; returns how far it came."""
    rank, workers, per_step = dist.get_rank(), dist.get_world_size(), settings.data.rows_per_step
    rows = itertools.takewhile(lambda row: row.place[0] < (settings.epochs or math.inf), data.rows)
    saved = evaluated = progress
    taken = 0  # rows of the order that all ranks took since the start: row i is rank i mod workers'
    while (spent := spent_share(settings, progress)) < 1 and not _out_of_patience(settings, progress):
        started = time.perf_counter()
        mine = sum((taken + i) % workers == rank for i in range(per_step))
        batches = list(itertools.islice(rows, mine))
        waited = time.perf_counter() - started

        counted = [(1, row.supervised, row.positions, row.images, data.flops(row)) for row in batches]
        sums = (*np.sum([(0, 0, 0, 0, 0), *counted], axis=0), waited, watch.wants_checkpoint())
        n_rows, tokens, positions, images, flops, all_waited, wishes = _sum_over_ranks(*sums)
        if not n_rows:
            break  # the end of the data, which all ranks see in the same step
        place, epochs = _last_row((taken + int(n_rows) - 1) % workers, batches)
        taken += per_step

        loss = torch.zeros((), device=strategy.device)
        passes = batches + [data.blank] * (math.ceil(per_step / workers) - len(batches))
        for i, batch in enumerate(passes, start=1):
            _seed(settings.seed, batch.place)
            part = strategy.model(
                **batch.inputs,
                num_items_in_batch=max(tokens, 1),
                row_length=settings.data.pack_length,
                **LOSS_ONLY,
            ).loss
            strategy.backward(part, last=i == len(passes))
            loss += part.detach()
            watch.alive()

        done = progress.tokens + int(tokens)
        progress = replace(progress, step=progress.step + 1, place=place, tokens=done, epochs=epochs)
        factor = rate_factor(spent, spent_share(settings, progress), settings.optimizer)
        for group in strategy.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        (whole_loss,) = _sum_over_ranks(loss.item())
        norm = strategy.step(partial(watch.accepts, progress.step, whole_loss, partial(_keys, batches)))

        (seconds,) = _sum_over_ranks(time.perf_counter() - started)
        progress = replace(progress, seconds=progress.seconds + seconds / workers)
        rates = {group["pattern"]: group["lr"] for group in strategy.optimizer.param_groups}
        record = StepRecord(
            step=progress.step,
            place=place,
            loss=whole_loss,
            learning_rate=max(rates.values()),
            learning_rates=rates,
            gradient_norm=norm,
            tokens=int(tokens),
            positions=int(positions),
            images=int(images),
            flops=flops,
            seconds=seconds / workers,
            data_wait=all_waited / workers,
            spent=spent_share(settings, progress),
        )
        watch.step(record)
        if progress.step % settings.evaluation.every == 0 or record.spent >= 1:
            progress = evaluated = _evaluate(settings, strategy, data, progress, watch)
        if progress.step % settings.checkpoint.every == 0 or wishes:
            saved = progress
            watch.checkpoint(saved)
    if progress.step > evaluated.step:
        progress = _evaluate(settings, strategy, data, progress, watch)
    if progress.step > saved.step:
        watch.checkpoint(progress)
    return progress


def spent_share(settings: RunSettings, progress: Progress) -> float:
    """The share of the budget that is spent: of the limits that are set, the one nearest to its end."""
    done = {"steps": progress.step, "tokens": progress.tokens, "minutes": progress.seconds / 60}
    done["epochs"] = progress.epochs
    return max(done[name] / limit for name, limit in settings.budget.items())


def _out_of_patience(settings: RunSettings, progress: Progress) -> bool:
    return 0 < settings.evaluation.patience <= progress.worse


def _evaluate(settings: RunSettings, strategy: Strategy, data: Data, progress: Progress, watch: Watch) -> Progress:
    """The loss on the held-out rows. A rank whose rows have ended runs blank ones until all ranks' have."""
    started, total, tokens = time.perf_counter(), 0.0, 0
    rows = iter(data.held_out)
    strategy.model.eval()
    with torch.no_grad():
        while True:
            row = next(rows, None)
            supervised = row.supervised if row else 0
            n_rows, labelled = _sum_over_ranks(row is not None, supervised)
            if not n_rows:
                break
            inputs = (row or data.blank).inputs
            length = settings.data.pack_length
            loss = strategy.model(**inputs, num_items_in_batch=1, row_length=length, **LOSS_ONLY).loss
            total += _sum_over_ranks(loss.item())[0]
            tokens += int(labelled)
            watch.alive()
    strategy.model.train()
    if not tokens:
        if settings.evaluation.dataset:
            raise SettingsError(
                f"--evaluation.dataset {settings.evaluation.dataset} has no answer that could be used: of its samples "
                "none was read, or none fits --data.pack-length"
            )
        return progress
    loss_now = total / tokens
    watch.evaluation(Evaluation(progress.step, loss_now, tokens, time.perf_counter() - started))
    if loss_now < progress.best:
        return replace(progress, best=loss_now, worse=0)
    return replace(progress, worse=progress.worse + 1)


def _keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def _seed(seed: int, place: Place) -> None:
    """A row's dropout is its own: the same on whichever rank it is trained, and when it is trained again."""
    torch.manual_seed(int(np.random.SeedSequence(seed, spawn_key=place).generate_state(1, np.uint64)[0]))


def _sum_over_ranks(*values: float) -> list[Any]:
    """Sums in float64, so that counts stay exact."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def _last_row(rank: int, rows: list[Batch]) -> tuple[Place, float]:
    """Place and epochs of the last of that rank's `rows`, on every rank."""
    place = torch.tensor(rows[-1].place if rows else (0, 0, 0))
    epochs = torch.tensor(rows[-1].epochs if rows else 0.0, dtype=torch.float64)
    dist.broadcast(place, src=rank)
    dist.broadcast(epochs, src=rank)
    epoch, window, row = place.tolist()
    return (epoch, window, row), epochs.item()
