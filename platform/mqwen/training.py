"""The story of a training run, which jobs/pretrain.py and jobs/finetune.py tell alike."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace

from mqwen.cluster import cluster
from mqwen.data.dataset import open_dataset
from mqwen.data.heldout import HeldOut
from mqwen.data.order import Order, OrderSettings, Position
from mqwen.data.reader import WindowReader
from mqwen.data.stream import LEASE, READER, Stream
from mqwen.model import MQWenConfig, MQWenProcessor
from mqwen.storage import Location, MissingFileError, local_folder, locate, readable
from mqwen.train import checkpoint
from mqwen.train.build import outline, starting_point
from mqwen.train.cost import cost_of
from mqwen.train.loop import Place, Progress
from mqwen.train.records import read_metrics
from mqwen.train.run import SETTINGS, open_run, train_run
from mqwen.train.settings import DataSettings, RunSettings, SettingsError
from mqwen.train.worker import Feed

UNBOUNDED_ROWS = 2**31  # where the budget does not say how many it can want
HELD_OUT_SAMPLES = 64  # of a window of held-out rows, which one worker reads


def order_of(settings: RunSettings, image_positions: int) -> Order:
    """The order that a run trains on. Raises DataError where a dataset cannot be used."""
    weights = settings.data.mixture or {settings.data.dataset: 1.0}
    datasets = [open_dataset(readable(uri)) for uri in weights]
    return Order(datasets, order_settings(settings, image_positions), list(weights.values()))


def order_settings(settings: RunSettings, image_positions: int) -> OrderSettings:
    data = settings.data
    return OrderSettings(
        settings.seed, data.pack_length, data.packs_per_row, image_positions, data.run_samples, data.window_runs
    )


def reader_of(run: Location, step: int) -> tuple[WindowReader, Place]:
    """What reads the rows of a run's order from a step's first one on, and the place of the step's last.

    The run's metrics tell both. Raises SettingsError for a step of which they tell nothing.
    """
    try:
        raw = json.loads((run / SETTINGS).read_bytes())
    except MissingFileError as error:
        raise SettingsError(f"{run} is no run: it has no {SETTINGS}") from error
    known = {record["step"]: tuple(record["place"]) for record in read_metrics(run, upto=step, last=2)}
    if not {step, max(1, step - 1)} <= known.keys():
        last = max((record["step"] for record in read_metrics(run, last=1)), default=0)
        raise SettingsError(
            f"step {step} is none of {run}, whose metrics tell of the steps 1 to {last}; they are written with each "
            "checkpoint"
        )
    settings = RunSettings(raw["name"], data=DataSettings(**raw["data"]), seed=raw["seed"])
    model = local_folder(run / "model")
    order = order_of(settings, MQWenConfig.from_json_file(model / "config.json").image_positions)
    start = position(Progress(step - 1, known.get(step - 1)))
    return WindowReader(order, MQWenProcessor.from_pretrained(model), start), known[step]


def position(progress: Progress) -> Position:
    return Position.after(progress.place) if progress.place else Position()


def run_training(settings: RunSettings, watched: Callable[[Feed], Feed] = lambda feed: feed) -> None:
    """Checks everything that can be known before, then trains on a cluster, until the budget is spent.

    `watched` may put between the stream and the workers what sees their rows.
    """
    settings.check()
    config, processor = starting_point(settings)
    cost = cost_of(outline(settings, config))
    order = order_of(settings, config.image_positions)
    rows = settings.steps * settings.data.rows_per_step if settings.steps else UNBOUNDED_ROWS
    stream = Stream(order, processor, rows, name=str(locate(settings.runs) / settings.name))
    for dataset in order.datasets:
        dataset.check_shards()
    held_out = _held_out(settings, config, processor)
    feed = Feed(
        split=lambda progress, workers: stream.split(position(progress), workers),
        rows=lambda part, progress: stream.read(part, position(progress), settings.data.max_bad),
        blank=stream.blank(),
        held_out=held_out.share if held_out else None,
        environment=LEASE,
        readers=READER,
    )
    cpus = settings.parallel.workers * settings.parallel.cpus_per_worker + 2
    with open_run(settings, config, processor) as run:
        try:
            with cluster(cpus):
                train_run(settings, run, config, watched(feed), cost)
        except (KeyboardInterrupt, SystemExit):
            last = checkpoint.progress(run).step
            kept = f"its last checkpoint is of step {last}" if last else "it has no checkpoint yet"
            print(f"run {run}: stopped; {kept}. The same command goes on from there", file=sys.stderr)
            raise
        from mqwen.train.report import write_report  # brings matplotlib, for which no worker need wait

        print(f"run {run}: {write_report(run)}")


def _held_out(settings: RunSettings, config: MQWenConfig, processor: MQWenProcessor) -> HeldOut | None:
    """The rows of `evaluation.dataset`, checked as those to train on are; the same whatever the run's seed."""
    if not settings.evaluation.dataset:
        return None
    dataset = open_dataset(readable(settings.evaluation.dataset))
    dataset.check_tokenizer(processor.tokenizer.fingerprint)
    dataset.check_shards()
    small = replace(
        order_settings(settings, config.image_positions), seed=0, run_samples=HELD_OUT_SAMPLES, window_runs=1
    )
    return HeldOut(Order([dataset], small), processor, settings.data.max_bad)
