"""Trainings on several GPUs: the real job (job.py) on a cluster of this machine, and what its records say."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from typing import Any

from mqwen.cluster import cluster
from mqwen.data.stream import Stream
from mqwen.storage import locate
from mqwen.train.build import starting_point
from mqwen.train.records import read_metrics
from mqwen.train.settings import ComputeSettings, RunSettings
from mqwen.training import order_of
from tests.benchmarks.h200.whole_job import Job
from tests.benchmarks.killing import Kills, follow
from tests.benchmarks.several.job import digest_of, write_job
from tests.benchmarks.several.nodes import Nodes, nodes
from tests.benchmarks.several.place import Place, cpus_per_worker
from tests.benchmarks.several.report import Case
from tests.benchmarks.several.trace import communication
from tests.data.digest import digest, plain_steps

WARM_STEPS = 3
AFTER = 4  # steps after the one with the checkpoint: its copy and its writing are beside them; the last one is traced
DIGEST_ROWS = 8  # a step: what 1, 2, 4 and 8 workers divide
DIGEST_STEPS = 12
PAUSE = 0.2  # seconds before each row of an elastic run
LIMIT = 240.0  # seconds that a training may take on GPUs
SLOW_LIMIT = 900.0  # and on a CPU that others use too
SAVED = re.compile(r"step (\d+): checkpoint")
STEP = re.compile(r"step (\d+)/")


def hear(line: str) -> None:
    print(f"    {line}", end="", flush=True)


@contextmanager
def own_cluster(most: int) -> Iterator[None]:
    """Room for `most` workers and those who read for them, also on fewer cores."""
    with cluster(cpus=cpus_per_worker() * most + 4, show_workers=False, dashboard=False):
        yield


def case_of(part: str, settings: RunSettings, place: Place, name: str = "") -> Case:
    return {
        "name": name or f"{part} {settings.name}",
        "part": part,
        "strategy": settings.parallel.strategy,
        "world_size": settings.parallel.workers,
        "backend": "nccl" if place.gpus else "gloo",
        "device": place.about["device"],
    }


def run(
    settings: RunSettings,
    place: Place,
    heard: Callable[[str], None] = lambda line: None,
    seen: Path | None = None,
    pause: float = 0.0,
    environment: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Its records."""

    def both(line: str) -> None:
        hear(line)
        heard(line)

    command = write_job(settings, place.folder / f"{settings.name}.json", seen, pause)
    follow(command, environment or {}, both, LIMIT if place.gpus else SLOW_LIMIT)
    records = read_metrics(locate(settings.runs) / settings.name)
    assert [record["step"] for record in records] == list(range(1, (settings.steps or 0) + 1))
    return records


@contextmanager
def run_folder(settings: RunSettings) -> Iterator[Path]:
    """It is deleted afterwards: checkpoints are large."""
    folder = Path(settings.runs) / settings.name
    try:
        yield folder
    finally:
        rmtree(folder, ignore_errors=True)


def weak(place: Place, job: Job, strategy: Any, workers: int) -> Case:
    """`job.steps` steps are measured, after some that warm up; then comes a checkpoint, with several workers."""
    base, saved = place.settings, WARM_STEPS + job.steps
    # ZeRO-3 gathers weights in hooks of modules within a block, which no compiled block has; not compiled, half the
    # packs take as much memory.
    compiled = job.compiled and strategy == "fsdp2"
    half = 1 if strategy == "fsdp2" else 2
    settings = replace(
        base,
        name=f"{strategy}-{workers}",
        steps=saved + AFTER,
        data=replace(base.data, packs_per_row=job.packs // half, rows_per_step=job.passes * half * workers),
        parallel=replace(base.parallel, workers=workers, strategy=strategy),
        compute=ComputeSettings(compile=compiled),
        checkpoint=replace(base.checkpoint, every=saved if workers > 1 else 10**9, keep=1),
        profile=(saved + AFTER,) if workers > 1 else (),
    )
    with run_folder(settings) as folder:
        records = run(settings, place)
        traces = sorted((folder / "profile").glob("*.trace.json.gz"))
        traced = communication(traces[-1]) if traces else None
    measured = records[WARM_STEPS:saved]
    seconds = sum(record["seconds"] for record in measured)
    # From a step's end to the next one's, which a checkpoint's beginning is part of.
    between = [later["time"] - earlier["time"] for earlier, later in pairwise(records[WARM_STEPS : saved + 1])]
    return case_of("weak", settings, place) | {
        "positions_per_s_per_gpu": sum(record["positions"] for record in measured) / seconds / workers,
        "images_per_s_per_gpu": sum(record["images"] for record in measured) / seconds / workers,
        "step_s": seconds / len(measured),
        "data_wait": sum(record["data_wait"] for record in measured) / seconds,
        "mfu": statistics.fmean(record["mfu"] for record in measured),
        "memory": max(record["memory"] for record in records),
        "checkpoint_stall_s": between[-1] - statistics.median(between[:-1]) if workers > 1 else None,
        "communication": asdict(traced) if traced else None,
        "first_step_s": records[0]["seconds"],
        "steps_s": [record["seconds"] for record in records],
        "losses": [record["loss"] for record in records],
        "settings": asdict(settings.data) | asdict(settings.parallel) | asdict(settings.compute),
    }


def small(place: Place, name: str, workers: int, steps: int = DIGEST_STEPS) -> RunSettings:
    base = place.small
    return replace(
        base,
        name=name,
        steps=steps,
        data=replace(base.data, packs_per_row=1, rows_per_step=DIGEST_ROWS, run_samples=16, window_runs=4),
        parallel=replace(base.parallel, workers=workers),
        compute=ComputeSettings(),
        checkpoint=replace(base.checkpoint, every=10**9, keep=1),
    )


def expected_digest(settings: RunSettings) -> str:
    """A plain loop's, in this process."""
    config, processor = starting_point(settings)
    stream = Stream(order_of(settings, config.image_positions), processor, rows=1)
    assert settings.steps is not None
    return digest(plain_steps(stream, settings.data.rows_per_step, settings.steps))


def same_samples(place: Place, counts: list[int]) -> Iterator[Case]:
    """The digests of a short run of the small model on so many workers each. All but the largest run beside each other,
    where there are GPUs for them, as nobody times them."""
    runs = [small(place, f"digest-{workers}", workers) for workers in sorted(counts)]
    expected = expected_digest(runs[0])

    def case(settings: RunSettings) -> Case:
        seen = place.folder / f"seen-{settings.name}"
        with run_folder(settings):
            records = run(settings, place, seen=seen)
        found = digest_of(settings, seen, records)
        losses = [record["loss"] for record in records]
        known = {"digest": found, "as_expected": found == expected, "losses": losses}
        return case_of("digest", settings, place) | known

    failures = list[BaseException]()
    with ThreadPoolExecutor(len(runs) if place.gpus else 1) as threads:
        for group in (runs[:-1], runs[-1:]):
            for done in as_completed([threads.submit(case, settings) for settings in group]):
                if failure := done.exception():
                    failures.append(failure)
                else:
                    yield done.result()
    if failures:
        raise failures[0]


def kill(place: Place, job: Job, workers: int) -> Case:
    """SIGKILL of the last rank of the real model's run, two steps after it has a checkpoint."""
    base, every = place.settings, max(4, job.steps // 2)
    settings = replace(
        base,
        name=f"kill-{workers}",
        steps=(4 if place.gpus else 20) * every,
        data=replace(base.data, rows_per_step=job.passes * workers),
        parallel=replace(base.parallel, workers=workers),
        checkpoint=replace(base.checkpoint, every=every, keep=1),
    )
    saved, since = 0, 0

    def due(line: str, _: float) -> bool:
        nonlocal saved, since
        saved += bool(SAVED.search(line))
        since += bool(saved and STEP.search(line))
        return saved >= 1 and since >= 2

    kills = Kills(1, due, lambda found: found[-1])
    with run_folder(settings):
        records = run(settings, place, kills)
    assert kills.began is not None
    trained = sum(record["seconds"] for record in records[1:])
    assert kills.took, "the run had ended before its worker could be killed"
    return case_of("kill", settings, place) | {
        "kill_to_next_step_s": kills.took[0],
        "within_60_s": kills.took[0] <= 60,
        "goodput": trained / (time.monotonic() - kills.began),
        "goodput_as_printed": records[-1]["goodput"],
        "steps": len(records),
    }


def elastic(place: Place, workers: int) -> Case:
    """The small model's run on two nodes of this machine, which loses one, goes on with half of the workers, and takes
    all again some time after another node has come. Steps go on as long as that takes."""
    half, cpus = workers // 2, max(2, cpus_per_worker())
    settings = small(place, f"elastic-{workers}", workers, steps=10**6)
    settings = replace(
        settings,
        parallel=replace(settings.parallel, min_workers=half, cpus_per_worker=cpus),
        checkpoint=replace(settings.checkpoint, every=5),
    )
    seen = place.folder / "seen-elastic"
    gpus = half if place.gpus else 0
    # What a node has beside its workers' CPUs reads for them, and is too little for one worker more.
    with run_folder(settings), nodes(half * cpus + cpus - 1, gpus) as found:
        changing = Changing(found, workers, half)
        with suppress(EnoughError):
            run(settings, place, changing, seen, PAUSE, {"RAY_ADDRESS": found.address})
        records = read_metrics(locate(settings.runs) / settings.name)
    settings = replace(settings, steps=len(records))
    sha = digest_of(settings, seen, records)
    return case_of("elastic", settings, place) | {
        "digest": sha,
        "as_expected": sha == expected_digest(settings),
        "steps": len(records),
        **changing.took,
    }


class EnoughError(Exception):
    """All was seen; the run need not go on."""


class Changing:
    """Hears a run, loses a node of it and adds one. `took` are seconds until a step with other workers."""

    def __init__(self, found: Nodes, workers: int, half: int) -> None:
        self.took: dict[str, float] = {}
        self._nodes, self._numbers = found, (half, workers)
        self._stage, self._resumed, self._since = 0, False, time.monotonic()

    def __call__(self, line: str) -> None:
        if self._stage in (1, 3) and (number := re.search(r"resumed from \S+ with (\d+) workers", line)):
            self._resumed = int(number[1]) == self._numbers[self._stage // 2]
        if self._stage == 0 and SAVED.search(line):
            self._next(self._nodes.lose)
        elif self._stage == 1 and self._resumed and STEP.search(line):
            self.took["fewer_s"] = time.monotonic() - self._since
            self._next(lambda: None)
        elif self._stage == 2 and SAVED.search(line):
            self._next(self._nodes.add)
        elif self._stage == 3 and self._resumed and STEP.search(line):
            self.took["more_s"] = time.monotonic() - self._since
            self._next(lambda: None)
        elif self._stage == 4 and SAVED.search(line):
            raise EnoughError

    def _next(self, act: Callable[[], None]) -> None:
        self._stage, self._resumed, self._since = self._stage + 1, False, time.monotonic()
        act()
