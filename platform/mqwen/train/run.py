"""A run, seen from the driver: its folder, its worker group, its end.

RUNS/NAME/settings.json     what it computes
RUNS/NAME/model/            configuration, tokenizer and processor: an artifact without weights
RUNS/NAME/checkpoints/      see checkpoint.py
RUNS/NAME/metrics/          one line a step
RUNS/NAME/starts/           see provenance.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from mqwen.errors import UserError
from mqwen.model import MQWenConfig, MQWenProcessor
from mqwen.storage import Location, writable
from mqwen.telemetry import training
from mqwen.train import checkpoint
from mqwen.train.loop import Batch, Progress
from mqwen.train.provenance import record_start
from mqwen.train.resources import require
from mqwen.train.settings import RunSettings, SettingsError
from mqwen.train.worker import Rows, Task, work

SETTINGS = "settings.json"
# What may change when a run goes on: none of it changes what a step computes.
FREE_TO_CHANGE = ("parallel", "checkpoint", "log_every", "runs")


class TrainingError(UserError):
    """The workers failed more often than they may. The message is each rank's own, once."""

    def __init__(self, error: ray.train.WorkerGroupError) -> None:
        reasons: dict[str, list[int]] = {}
        for rank, failure in error.worker_failures.items():
            cause = getattr(failure, "cause", failure)  # Ray wraps what a worker raised
            reasons.setdefault(f"{type(cause).__name__}: {cause}", []).append(rank)
        listed = "; ".join(f"rank {', '.join(map(str, ranks))}: {reason}" for reason, ranks in reasons.items())
        super().__init__(f"training stopped, its checkpoints stay. {listed}")


def open_run(settings: RunSettings, config: MQWenConfig, processor: MQWenProcessor) -> Location:
    """The run's folder, new or to be continued.

    Raises SettingsError where a run of that name exists with other settings, StorageError where none can be written.
    """
    run = writable(settings.runs) / settings.name
    mine = json.loads(json.dumps(asdict(settings)))
    if (run / SETTINGS).exists():
        theirs = json.loads((run / SETTINGS).read_bytes())
        if other := [key for key in mine if key not in FREE_TO_CHANGE and mine[key] != theirs.get(key)]:
            raise SettingsError(
                f"run {run} exists with other settings ({', '.join(other)}); give another --name to start a new run, "
                "or the same settings to continue it"
            )
    else:
        with tempfile.TemporaryDirectory() as local:
            config.save_pretrained(local)
            processor.save_pretrained(local)
            for file in Path(local).iterdir():
                (run / "model" / file.name).upload(file)
    (run / SETTINGS).write_bytes(json.dumps(mine, indent=1).encode())
    return run


def train_run(
    settings: RunSettings,
    run: Location,
    config: MQWenConfig,
    dataset: Callable[[Progress], ray.data.Dataset],
    split: ray.train.DataConfig,
    rows: Rows,
    blank: Batch,
) -> ray.train.Result:
    """Trains until the last step. `dataset` gives the rows from a progress on; `rows` reads one rank's of them.

    Raises ResourcesError before a worker starts where the cluster has no room for all of them.
    """
    require(settings.parallel.bundle, settings.parallel.workers, settings.parallel.wait_for_resources)
    record_start(run)
    gpus = settings.parallel.gpus_per_worker

    def dataset_from_checkpoint() -> ray.data.Dataset:
        """Called at each start of the worker group: after a failure the stream starts where the checkpoint stands."""
        training.WORKER_GROUP_STARTS.add(run=settings.name)
        return dataset(checkpoint.progress(run))

    # Ray's own list of checkpoints is bound to its version and to checkpoints that are still there. Ours is the
    # committed checkpoints themselves, so every job starts with a list of its own.
    (checkpoint.folder(run) / "checkpoint_manager_snapshot.json").delete()
    trainer = TorchTrainer(
        work,
        train_loop_config={"task": Task(settings, run, config, rows, blank)},
        # Counts are summed over gloo beside the gradients' NCCL, so that no step waits for the GPU to count.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.parallel.workers,
            use_gpu=bool(gpus),
            resources_per_worker=settings.parallel.bundle,
        ),
        datasets={"train": dataset_from_checkpoint},
        dataset_config=split,
        run_config=ray.train.RunConfig(
            name=checkpoint.FOLDER,
            storage_path=run.path,
            storage_filesystem=run.filesystem,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=settings.parallel.max_failures),
        ),
    )
    try:
        return trainer.fit()
    except ray.train.WorkerGroupError as error:
        raise TrainingError(error) from error
