"""A run, seen from the driver: its folder, its worker group, its end.

RUNS/NAME/settings.json     what it computes
RUNS/NAME/model/            configuration, tokenizer and processor: an artifact without weights
RUNS/NAME/checkpoints/      see checkpoint.py
RUNS/NAME/metrics/          one line a step
RUNS/NAME/evaluations/      one line an evaluation
RUNS/NAME/tensorboard/      both, for TensorBoard
RUNS/NAME/profile/          see profile.py
RUNS/NAME/report.html       see report.py
RUNS/NAME/starts/           see provenance.py
RUNS/NAME/driver-ID.json    see claim.py
RUNS/NAME/ended.txt         why the last start ended, where that would come again (worker.py)
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from mqwen.errors import LastingError, UserError
from mqwen.model import MQWenConfig, MQWenProcessor
from mqwen.resources import require
from mqwen.storage import Location, readable, writable
from mqwen.telemetry import training
from mqwen.train import checkpoint, spares
from mqwen.train.claim import claimed
from mqwen.train.cost import Cost
from mqwen.train.provenance import record_start
from mqwen.train.settings import RunSettings, SettingsError
from mqwen.train.worker import ENDED, Feed, Task, work

SETTINGS = "settings.json"
# What may change when a run goes on: none of it changes what a step computes.
FREE_TO_CHANGE = ("parallel", "compute", "checkpoint", "log_every", "profile", "runs")


# What PyTorch says where memory ends on the CPU, for which it has no error of its own.
NO_CPU_MEMORY = "can't allocate memory"


class TrainingError(UserError):
    """The workers failed more often than they may. The message is each rank's own, once."""

    def __init__(self, worker_failures: dict[int, Exception]) -> None:
        reasons: dict[str, list[int]] = {}
        for rank, failure in worker_failures.items():
            cause = getattr(failure, "cause", failure)  # Ray wraps what a worker raised
            reasons.setdefault(_reason(cause), []).append(rank)
        listed = "; ".join(f"rank {', '.join(map(str, ranks))}: {reason}" for reason, ranks in reasons.items())
        super().__init__(f"training stopped, its checkpoints stay. {listed}")


@contextmanager
def open_run(settings: RunSettings, config: MQWenConfig, processor: MQWenProcessor) -> Iterator[Location]:
    """The run's folder, new or to be continued, and no other driver's while it is open.

    Raises SettingsError where a run of that name has trained with other settings, RunInUseError where it is open
    elsewhere, StorageError where none can be written.
    """
    run = writable(settings.runs) / settings.name
    with claimed(run):
        _begin(run, settings, config, processor)
        yield run


def _begin(run: Location, settings: RunSettings, config: MQWenConfig, processor: MQWenProcessor) -> None:
    mine = json.loads(json.dumps(asdict(settings)))
    theirs = json.loads((run / SETTINGS).read_bytes()) if (run / SETTINGS).exists() else None
    other = [] if theirs is None else _differences(_lasting(theirs), _lasting(mine))
    if other and checkpoint.committed(run):
        raise SettingsError(
            f"run {run} exists with other settings ({', '.join(other)}); give another --name to start a new run, or "
            "the same settings to continue it"
        )
    # Of a start that was refused, or ended before its first checkpoint, nothing needs to stay.
    if other or theirs is None:
        (run / "model").delete()
        with tempfile.TemporaryDirectory() as local:
            config.save_pretrained(local)
            processor.save_pretrained(local)
            for file in Path(local).iterdir():
                (run / "model" / file.name).upload(file)
    (run / SETTINGS).write_bytes(json.dumps(mine, indent=1).encode())


def _lasting(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in FREE_TO_CHANGE}


def _differences(theirs: dict[str, Any], mine: dict[str, Any], prefix: str = "") -> list[str]:
    """What is not the same, as options: "data.pack-length is 90, not 60"."""
    found = []
    for key in sorted(theirs.keys() | mine.keys()):
        old, new, name = theirs.get(key), mine.get(key), prefix + key.replace("_", "-")
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} is {old}, not {new}")
    return found


def _reason(cause: Exception) -> str:
    reason = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, torch.OutOfMemoryError | ray.exceptions.OutOfMemoryError) or NO_CPU_MEMORY in reason:
        return (
            f"out of memory ({reason}). A row is what one forward pass takes: lower --data.packs-per-row or "
            "--data.pack-length; weights and optimizer are shared out: more --parallel.workers; blocks gathered in the "
            "forward pass stay for the backward one without --parallel.reshard-after-forward"
        )
    return reason


def train_run(settings: RunSettings, run: Location, config: MQWenConfig, feed: Feed, cost: Cost) -> None:
    """Trains until the budget is spent.

    Raises TrainingError where workers are lost more often than they may be, LastingError where starting anew does not
    help, ResourcesError before a worker starts where the cluster has no room for all of them.
    """
    parallel = settings.parallel
    require(
        parallel.bundle,
        parallel.fewest,
        parallel.wait_for_resources,
        "workers",
        "Ask for fewer or smaller workers, or for time to wait for more with --parallel.wait-for-resources",
        "a small model can be trained without, with --parallel.gpus-per-worker 0 --model.precision float32",
    )
    record_start(run)
    gpus = parallel.gpus_per_worker
    source = readable(settings.model.init_from) if settings.model.init_from else None
    productive = checkpoint.progress(run).seconds
    variables = spares.environment(feed.readers) if parallel.spares else {}
    trainer = TorchTrainer(
        work,
        train_loop_config={"task": Task(settings, run, config, source, feed, cost, time.time(), productive)},
        # Counts are summed over gloo beside the gradients' NCCL, so that no step waits for the GPU to count.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=parallel.workers if parallel.min_workers is None else (parallel.fewest, parallel.workers),
            use_gpu=bool(gpus),
            resources_per_worker=parallel.bundle,
        ),
        # Ray is told of no checkpoint: its list of them would have to be right, and at hand, for a run to go on. What
        # counts are the committed ones, which workers find in the run's folder.
        run_config=ray.train.RunConfig(
            name=checkpoint.FOLDER,
            storage_path=run.path,
            storage_filesystem=run.filesystem,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=parallel.max_failures),
            worker_runtime_env={"env_vars": variables | feed.environment},
        ),
    )
    (run / ENDED).delete()
    forget = training.DRIVEN.follow(lambda: 1, run=settings.name)
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        raise TrainingError(error.worker_failures) from error
    except SystemExit as error:
        if error.code in (0, 1):  # so Ray Train's own handler of Ctrl-C ends, and what a signal raises in `ray.get`
            raise KeyboardInterrupt from error
        raise
    finally:
        forget()
    if (run / ENDED).exists():
        raise LastingError(f"training stopped, its checkpoints stay. {(run / ENDED).read_bytes().decode()}")
