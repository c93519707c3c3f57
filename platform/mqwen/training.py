"""The story of a training run, which jobs/pretrain.py and jobs/finetune.py tell alike."""

from __future__ import annotations

import argparse

import tyro

from mqwen.cluster import cluster
from mqwen.data.manifest import check_shards, read_manifest
from mqwen.data.order import Order, OrderSettings, Position
from mqwen.data.stream import OrderedSplit, Stream
from mqwen.storage import readable
from mqwen.train.build import check_trainable, starting_point
from mqwen.train.loop import Progress
from mqwen.train.recipes import recipe
from mqwen.train.report import write_report
from mqwen.train.run import open_run, train_run
from mqwen.train.settings import RunSettings


def read_settings(description: str | None) -> RunSettings:
    """The recipe that --recipe names, overridden by every other option."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    named, rest = parser.parse_known_args()
    return tyro.cli(RunSettings, default=recipe(named.recipe), args=rest, description=description)


def run_training(settings: RunSettings) -> None:
    """Checks everything that can be known before, then trains on a cluster, to the last step."""
    settings.check()
    config, processor = starting_point(settings)
    check_trainable(settings, config)
    dataset = readable(settings.data.dataset)
    manifest = read_manifest(dataset)
    order = Order(
        manifest,
        OrderSettings(
            settings.seed,
            settings.data.pack_length,
            settings.data.packs_per_row,
            config.image_positions,
            settings.data.run_samples,
            settings.data.window_runs,
        ),
    )
    stream = Stream(dataset, order, processor, rows=settings.steps * settings.data.rows_per_step)
    check_shards(dataset, manifest)
    run = open_run(settings, config, processor)

    def position(progress: Progress) -> Position:
        return Position.after(progress.place) if progress.place else Position()

    with cluster(cpus=settings.parallel.workers * settings.parallel.cpus_per_worker + 2):
        train_run(
            settings,
            run,
            config,
            dataset=lambda progress: stream.start(position(progress)),
            split=OrderedSplit(),
            rows=lambda shard, progress: stream.read(shard, position(progress), settings.data.max_bad),
            blank=stream.blank(),
        )
    print(f"run {run}: {write_report(run)}")
