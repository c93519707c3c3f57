"""The story of a training run, which jobs/pretrain.py and jobs/finetune.py tell alike."""

from __future__ import annotations

from mqwen.cluster import cluster
from mqwen.data.manifest import check_shards, read_manifest
from mqwen.data.order import Order, OrderSettings, Position
from mqwen.data.stream import Stream
from mqwen.storage import readable
from mqwen.train.build import check_trainable, starting_point
from mqwen.train.loop import Progress
from mqwen.train.report import write_report
from mqwen.train.run import open_run, train_run
from mqwen.train.settings import RunSettings


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

    def position(progress: Progress) -> Position:
        return Position.after(progress.place) if progress.place else Position()

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
