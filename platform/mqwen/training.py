"""The story of a training run, which jobs/pretrain.py and jobs/finetune.py tell alike."""

from __future__ import annotations

import json

from mqwen.cluster import cluster
from mqwen.data.dataset import open_dataset
from mqwen.data.order import Order, OrderSettings, Position
from mqwen.data.reader import WindowReader
from mqwen.data.stream import Stream
from mqwen.model import MQWenConfig, MQWenProcessor
from mqwen.storage import Location, MissingFileError, local_folder, readable
from mqwen.train.build import check_trainable, starting_point
from mqwen.train.loop import Progress
from mqwen.train.report import read_metrics, write_report
from mqwen.train.run import SETTINGS, open_run, train_run
from mqwen.train.settings import DataSettings, RunSettings, SettingsError


def order_of(settings: RunSettings, image_positions: int) -> Order:
    """The order that a run trains on. Raises DataError where a dataset cannot be used."""
    data = settings.data
    weights = data.mixture or {data.dataset: 1.0}
    return Order(
        [open_dataset(readable(uri)) for uri in weights],
        OrderSettings(
            settings.seed, data.pack_length, data.packs_per_row, image_positions, data.run_samples, data.window_runs
        ),
        list(weights.values()),
    )


def reader_of(run: Location, step: int) -> tuple[WindowReader, int, int]:
    """What reads the rows of a run's order, how many of them lie before a step's, and how many those are.

    The reader starts at the last position before the step that the run's metrics tell.
    """
    try:
        raw = json.loads((run / SETTINGS).read_bytes())
    except MissingFileError as error:
        raise SettingsError(f"{run} is no run: it has no {SETTINGS}") from error
    if not 1 <= step <= raw["steps"]:
        raise SettingsError(f"step {step} is none of {run}, whose steps are 1 to {raw['steps']}")
    settings = RunSettings(raw["name"], data=DataSettings(**raw["data"]), seed=raw["seed"])
    model = local_folder(run / "model")
    order = order_of(settings, MQWenConfig.from_json_file(model / "config.json").image_positions)
    known = [Progress(record["step"], tuple(record["place"])) for record in read_metrics(run) if record.get("place")]
    before = max((progress for progress in known if progress.step < step), key=lambda one: one.step, default=Progress())
    reader = WindowReader(order, MQWenProcessor.from_pretrained(model), position(before))
    rows = settings.data.rows_per_step
    return reader, (step - 1 - before.step) * rows, rows


def position(progress: Progress) -> Position:
    return Position.after(progress.place) if progress.place else Position()


def run_training(settings: RunSettings) -> None:
    """Checks everything that can be known before, then trains on a cluster, to the last step."""
    settings.check()
    config, processor = starting_point(settings)
    check_trainable(settings, config)
    order = order_of(settings, config.image_positions)
    stream = Stream(order, processor, rows=settings.steps * settings.data.rows_per_step)
    for dataset in order.datasets:
        dataset.check_shards()
    cpus = settings.parallel.workers * settings.parallel.cpus_per_worker + 2
    with open_run(settings, config, processor) as run:
        with cluster(cpus):
            train_run(
                settings,
                run,
                config,
                split=lambda progress, workers: stream.split(position(progress), workers),
                rows=lambda part, progress: stream.read(part, position(progress), settings.data.max_bad),
                blank=stream.blank(),
            )
        print(f"run {run}: {write_report(run)}")
