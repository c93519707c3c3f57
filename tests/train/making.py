"""A run small enough for tests, without Ray: its settings, its rows, its training."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mqwen import training
from mqwen.data.batch import Batch, unpack
from mqwen.data.dataset import open_dataset
from mqwen.data.heldout import HeldOut
from mqwen.data.order import Order, Position
from mqwen.data.reader import WindowReader
from mqwen.data.row import RowBuilder
from mqwen.model import MQWenLMHeadModel
from mqwen.storage import locate
from mqwen.train.build import build_model, outline, starting_point
from mqwen.train.cost import Cost, cost_of
from mqwen.train.loop import Data, Evaluation, Progress, StepRecord, Watch, train
from mqwen.train.saver import Saver
from mqwen.train.settings import (
    CheckpointSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
)
from mqwen.train.strategy import Strategy, make_strategy
from mqwen.train.worker import HeldOutRows

SIDE = 16  # pixels of a picture's side
SEEDS = range(520, 560)  # of the samples: some rows of these have no picture
CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 96,
    "seq_length": 128,
    "initializer_range": 0.2,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    },
}


def tiny_settings(tokenizer: Path, dataset: Path, runs: Path) -> RunSettings:
    """Five rows a step, which neither two workers nor three divide; a checkpoint every second step."""
    return RunSettings(
        name="tiny",
        runs=str(runs),
        tokenizer=str(tokenizer),
        model=ModelSettings(config=CONFIG),
        data=DataSettings(
            dataset=str(dataset), pack_length=90, packs_per_row=2, rows_per_step=5, run_samples=5, window_runs=3
        ),
        optimizer=OptimizerSettings(learning_rate=1e-2, learning_rates={"visual.*": 1e-3}, warmup=1 / 3),
        checkpoint=CheckpointSettings(every=2),
        steps=6,
    )


def order_of(settings: RunSettings) -> Order:
    return training.order_of(settings, starting_point(settings)[0].image_positions)


def rows_from(settings: RunSettings, progress: Progress) -> Iterator[Batch]:
    """The rows of the order behind a progress, without end."""
    order, processor = order_of(settings), starting_point(settings)[1]
    start = Position.after(progress.place) if progress.place else Position()
    reader = WindowReader(order, processor, start)
    for window in itertools.count():
        for table in reader.rows(window):
            yield unpack(table, settings.data.packs_per_row, SIDE)


def held_out_rows(settings: RunSettings) -> HeldOut:
    """Six windows of eight samples or fewer."""
    small = replace(order_of(settings).settings, run_samples=8, window_runs=1)
    dataset = open_dataset(locate(settings.evaluation.dataset))
    return HeldOut(Order([dataset], small), starting_point(settings)[1], settings.data.max_bad)


def row_cost(settings: RunSettings) -> Cost:
    return cost_of(outline(settings, starting_point(settings)[0]))


def blank_row(settings: RunSettings) -> Batch:
    builder = RowBuilder(starting_point(settings)[1], order_of(settings).settings)
    return unpack(builder.build([], [], Position(), Position()), settings.data.packs_per_row, SIDE)


def fresh_model(settings: RunSettings) -> MQWenLMHeadModel:
    return build_model(settings, starting_point(settings)[0]).train()


def fresh_strategy(settings: RunSettings) -> Strategy:
    """A model of the seed's weights, sharded over the ranks, as each worker makes it."""
    model = fresh_model(settings)
    return make_strategy(model, list(model.transformer.h), settings)


def train_ranks(
    settings: RunSettings,
    strategy: Strategy,
    progress: Progress,
    rank: int,
    workers: int,
    on_checkpoint: Callable[[Progress], None],
    end: int | None = None,
    on_evaluation: Callable[[Evaluation], None] = lambda evaluation: None,
    alive: Callable[[], None] = lambda: None,
) -> tuple[list[StepRecord], Progress]:
    """Trains this rank on its share of the rows behind `progress`, of which there are `end`."""
    records: list[StepRecord] = []
    rows = itertools.islice(rows_from(settings, progress), rank, end, workers)
    held_out = HeldOutRows(held_out_rows(settings).share, rank, workers) if settings.evaluation.dataset else ()
    data = Data(rows, blank_row(settings), held_out, row_cost(settings).of)
    watch = Watch(records.append, on_checkpoint, on_evaluation, alive=alive)
    last = train(settings, strategy, data, progress, watch)
    return records, last


def train_and_keep(rank: int, workers: int, settings: RunSettings) -> dict[int, dict[str, torch.Tensor]]:
    """The whole weights at each checkpoint, by step."""
    strategy, kept = fresh_strategy(settings), dict[int, dict[str, torch.Tensor]]()
    saver = Saver(locate(settings.runs) / settings.name, settings)

    def save(progress: Progress) -> None:
        saver.save(strategy.state(), progress)
        weights = strategy.model.state_dict().items()
        kept[progress.step] = {name: tensor.full_tensor().clone() for name, tensor in weights}  # type: ignore[operator]

    train_ranks(settings, strategy, Progress(), rank, workers, save)
    saver.wait()
    return kept


def other_seed(settings: RunSettings) -> RunSettings:
    return replace(settings, seed=settings.seed + 1)
