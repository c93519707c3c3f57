"""How the runs under a URI stand: from what they wrote, and from Ray where a cluster can be asked."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from ray.job_submission import JobDetails

from mqwen.storage import Location
from mqwen.train import checkpoint
from mqwen.train.checkpoint import CheckpointError
from mqwen.train.claim import Driver, drivers
from mqwen.train.provenance import Start, last_start
from mqwen.train.records import REPORT
from mqwen.train.run import SETTINGS

# unknown: its driver was on another machine, and Ray was not asked or does not know it.
State = Literal["finished", "running", "failed", "stopped", "unknown"]


@dataclass(frozen=True)
class RunStatus:
    """`step` of `steps`, if their number is the limit, is what the committed checkpoints hold, which lie at the steps
    `checkpoints`; `loss` is the mean over the steps since the last but one."""

    name: str
    state: State
    step: int
    steps: int | None
    loss: float | None
    checkpoints: list[int]
    started: Start | None


def run_statuses(runs: Location, jobs: list[JobDetails]) -> list[RunStatus]:
    """Every run under a URI, by name. `jobs` are the cluster's, or none where it is not asked."""
    names = [name for name in runs.names() if (runs / name / SETTINGS).exists()]
    return [_status(runs / name, jobs) for name in names]


def _status(run: Location, jobs: list[JobDetails]) -> RunStatus:
    steps = json.loads((run / SETTINGS).read_bytes())["steps"]
    found, start = checkpoint.committed(run), last_start(run)
    saved = [checkpoint.step_of(one) for one in found]
    loss = None
    with suppress(CheckpointError):  # a damaged one says nothing of its loss
        loss = checkpoint.read_commit(found[-1]).loss if found else None
    state: State = "finished" if (run / REPORT).exists() else _state(start, jobs, drivers(run))
    return RunStatus(run.name, state, saved[-1] if saved else 0, steps, loss, saved, start)


def _state(start: Start | None, jobs: list[JobDetails], holders: list[Driver]) -> State:
    """What Ray says of the driver that started the run last, or its claim. Ids repeat between clusters, so the time
    must fit too."""
    for job in jobs:
        driver = job.driver_info.id if job.driver_info else job.job_id
        if start and driver == start.job and _covers(job, datetime.fromisoformat(start.time).timestamp()):
            if job.status in ("RUNNING", "PENDING"):
                return "running"
            return "failed" if job.status == "FAILED" else "stopped"
    if any(holder.here for holder in holders):
        return "running"
    return "unknown" if holders else "stopped"


def _covers(job: JobDetails, time: float) -> bool:
    begin, end = (job.start_time or 0) / 1000, (job.end_time or float("inf")) / 1000  # from milliseconds
    return begin - 1 <= time <= end + 1
