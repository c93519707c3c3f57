"""The story of a training run, which jobs/pretrain.py and jobs/finetune.py tell alike."""

from __future__ import annotations

from dataclasses import replace

from mqwen.cluster import cluster
from mqwen.data.heldout import HeldOut
from mqwen.data.manifest import check_shards, check_tokenizer, read_manifest
from mqwen.data.order import Order, OrderSettings, Position
from mqwen.data.stream import Stream
from mqwen.model import MQWenConfig, MQWenProcessor
from mqwen.storage import readable
from mqwen.train.build import outline, starting_point
from mqwen.train.cost import cost_of
from mqwen.train.loop import Place, Progress
from mqwen.train.report import write_report
from mqwen.train.run import open_run, train_run
from mqwen.train.settings import RunSettings
from mqwen.train.worker import Feed

ENDLESS = 2**31  # rows, where the budget does not say how many it can want
HELD_OUT_SAMPLES = 64  # of a window of held-out rows, which one worker reads


def run_training(settings: RunSettings) -> None:
    """Checks everything that can be known before, then trains on a cluster, until the budget is spent."""
    settings.check()
    config, processor = starting_point(settings)
    cost = cost_of(outline(settings, config))
    dataset = readable(settings.data.dataset)
    manifest = read_manifest(dataset)
    order = Order(manifest, _order_settings(settings, config))
    rows = settings.steps * settings.data.rows_per_step if settings.steps else ENDLESS
    stream = Stream(dataset, order, processor, rows)
    check_shards(dataset, manifest)
    held_out = _held_out(settings, config, processor)

    def position(progress: Progress) -> Position:
        return Position.after(progress.place) if progress.place else Position()

    def epochs(place: Place) -> float:
        epoch, window, _ = place
        return epoch + window / order.windows

    feed = Feed(
        split=lambda progress, workers: stream.split(position(progress), workers),
        rows=lambda part, progress: stream.read(part, position(progress), settings.data.max_bad),
        blank=stream.blank(),
        epochs=epochs,
        held_out=held_out.share if held_out else None,
    )
    cpus = settings.parallel.workers * settings.parallel.cpus_per_worker + 2
    with open_run(settings, config, processor) as run:
        with cluster(cpus):
            train_run(settings, run, config, feed, cost)
        print(f"run {run}: {write_report(run)}")


def _order_settings(settings: RunSettings, config: MQWenConfig) -> OrderSettings:
    return OrderSettings(
        settings.seed,
        settings.data.pack_length,
        settings.data.packs_per_row,
        config.image_positions,
        settings.data.run_samples,
        settings.data.window_runs,
    )


def _held_out(settings: RunSettings, config: MQWenConfig, processor: MQWenProcessor) -> HeldOut | None:
    """The rows of `evaluation.dataset`, checked as those to train on are; the same whatever the run's seed."""
    if not settings.evaluation.dataset:
        return None
    dataset = readable(settings.evaluation.dataset)
    manifest = read_manifest(dataset)
    check_tokenizer(dataset, manifest, processor.tokenizer.fingerprint)
    check_shards(dataset, manifest)
    small = replace(_order_settings(settings, config), seed=0, run_samples=HELD_OUT_SAMPLES, window_runs=1)
    return HeldOut(dataset, Order(manifest, small), processor)
