"""The training loop, from top to bottom.

A step trains on a fixed run of rows of the order, whatever the number of workers: of a step's rows every rank takes
each W-th. Where W does not divide them, a rank that came short runs a blank row, because every rank must join every
collective operation of a forward and a backward pass.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from mqwen.train.optimizer import rate_factor
from mqwen.train.settings import RunSettings
from mqwen.train.strategy import Strategy

LOSS_ONLY = {"use_cache": False, "logits_to_keep": "labels"}  # no full logits: only labelled positions get any


class Batch(Protocol):
    """A row, ready for the model: `inputs` are forward's arguments, on the CPU (it moves
    them itself), `supervised` counts the labelled positions.

    `place` is the row's (epoch, window, row) in the order.
    """

    @property
    def inputs(self) -> dict[str, torch.Tensor]: ...
    @property
    def supervised(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def images(self) -> int: ...
    @property
    def place(self) -> tuple[int, int, int]: ...
    @property
    def keys(self) -> list[str]: ...


Accepts = Callable[[int, float, Callable[[], list[str]], float], bool]
"""Given a step, its loss, what gives the keys of this rank's samples, and the gradient norm: whether it is to count."""


@dataclass(frozen=True)
class StepRecord:
    """What a step did, over all ranks; times in seconds. `tokens` counts labelled positions."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    positions: int
    images: int
    seconds: float
    data_wait: float


@dataclass(frozen=True)
class Progress:
    """Steps done, and the place of the last row that they trained on; None before the first."""

    step: int = 0
    place: tuple[int, int, int] | None = None


def train(
    settings: RunSettings,
    strategy: Strategy,
    rows: Iterator[Batch],
    blank: Batch,
    progress: Progress,
    on_step: Callable[[StepRecord], None],
    on_checkpoint: Callable[[Progress], None],
    accepts: Accepts = lambda step, loss, keys, norm: True,
    wants_checkpoint: Callable[[], bool] = lambda: False,
) -> Progress:
    """Trains from `progress` to the last step, or to the end of the data, and returns how far it came.

    `rows` are this rank's; all that is called is called on every rank at the same steps. `wants_checkpoint` is asked
    for one beside those that are due: it is made when any rank wants it.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    per_step, every = settings.data.rows_per_step, settings.checkpoint.every
    saved = progress
    taken = 0  # rows of the order that all ranks took since the start: row i is rank i mod workers'
    for step in range(progress.step, settings.steps):
        started = time.perf_counter()
        mine = sum((taken + i) % workers == rank for i in range(per_step))
        batches = list(itertools.islice(rows, mine))
        waited = time.perf_counter() - started

        counted = [(1, batch.supervised, batch.positions, batch.images) for batch in batches]
        sums = np.sum([(0, 0, 0, 0), *counted], axis=0)
        n_rows, tokens, positions, images, wishes = _sum_over_ranks(*sums, wants_checkpoint())
        if not n_rows:
            break  # the end of the data, which all ranks see in the same step
        taken += per_step
        place = max((batch.place for batch in batches), default=progress.place)

        loss = torch.zeros((), device=strategy.device)
        passes = batches + [blank] * (math.ceil(per_step / workers) - len(batches))
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

        factor = rate_factor(step, settings.steps, settings.optimizer.warmup)
        for group in strategy.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        (whole_loss,) = _sum_over_ranks(loss.item())
        norm = strategy.step(partial(accepts, step + 1, whole_loss, partial(_keys, batches)))

        progress = Progress(step + 1, place)
        record = StepRecord(
            step=step + 1,
            loss=whole_loss,
            learning_rate=max(group["lr"] for group in strategy.optimizer.param_groups),
            gradient_norm=norm,
            tokens=int(tokens),
            positions=int(positions),
            images=int(images),
            seconds=time.perf_counter() - started,
            data_wait=waited,
        )
        on_step(record)
        if progress.step % every == 0 or wishes:
            saved = _over_all_ranks(progress)
            on_checkpoint(saved)
    if progress.step > saved.step:
        saved = _over_all_ranks(progress)
        on_checkpoint(saved)
    return saved


def _keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def _seed(seed: int, place: tuple[int, int, int]) -> None:
    """A row's dropout is its own: the same on whichever rank it is trained, and when it is trained again."""
    torch.manual_seed(int(np.random.SeedSequence(seed, spawn_key=place).generate_state(1, np.uint64)[0]))


def _sum_over_ranks(*values: float) -> list[Any]:
    """Sums in float64, so that counts stay exact."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def _over_all_ranks(progress: Progress) -> Progress:
    """The furthest place of any rank: the last row of the last step is one rank's alone."""
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, progress.place)
    return Progress(progress.step, max((place for place in places if place is not None), default=None))
