"""The whole job, Ray Data's stream from JPEGs in shards into a Ray Train worker, beside the bare loop on its rows."""

from __future__ import annotations

import gc
import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from mqwen.cluster import cluster
from mqwen.data.batch import Batch, unpack
from mqwen.data.order import Order, Position
from mqwen.data.reader import WindowReader
from mqwen.data.stream import Stream
from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor
from mqwen.train.build import build_model, outline, starting_point
from mqwen.train.cost import cost_of
from mqwen.train.loop import StepRecord
from mqwen.train.recipes import recipe
from mqwen.train.records import read_metrics
from mqwen.train.run import open_run, train_run
from mqwen.train.settings import ComputeSettings, RunSettings
from mqwen.train.strategy import make_strategy
from mqwen.train.worker import Feed
from mqwen.training import order_of
from tests.benchmarks.h200 import report
from tests.benchmarks.h200.cases import WARM_STEPS, Loop, Result, bare_loop, one_process, result_of
from tests.benchmarks.h200.measure import Ceilings
from tests.benchmarks.reading import make_photos, make_processor

THREADS = 5  # that read the bare loop's rows


@dataclass(frozen=True)
class Job:
    """`packs` of `length` positions a pass, `passes` a step; `samples` of one picture and a short conversation each."""

    packs: int = 16
    length: int = 2048
    passes: int = 4
    steps: int = WARM_STEPS + 8
    samples: int = 2048
    compiled: bool = True

    @classmethod
    def tiny(cls) -> Job:
        return cls(packs=2, length=256, passes=2, steps=WARM_STEPS + 3, samples=64, compiled=False)


def run_job(job: Job, config: MQWenConfig, device: torch.device, found: Ceilings) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        settings = prepare_job(job, config, device, Path(folder))
        config, processor = starting_point(settings)
        order = order_of(settings, config.image_positions)
        rows = first_rows(settings, order, processor)
        results = [
            result("bare loop on the stream's rows", job, settings, without_ray(settings, config, device, rows), found)
        ]
        print(report.line(results[0]), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        loop, memory = under_ray(settings, config, processor)
        theirs = result("the same under Ray", job, settings, loop, found)
        results.append(replace(theirs, memory=memory, reserved=0))
    bare, ours = results
    print(
        f"under Ray {ours.positions_per_s / bare.positions_per_s:.4f} of the bare loop's positions/s, data wait "
        f"{ours.split['data'] / ours.step_s:.2%}",
        flush=True,
    )
    return results


def result(name: str, job: Job, settings: RunSettings, loop: Loop, found: Ceilings) -> Result:
    needed = sum(record.flops for record in loop.measured) / sum(record.positions for record in loop.measured)
    return result_of(name, "sft-full", settings, loop, needed, found, asdict(job))


def prepare_job(job: Job, config: MQWenConfig, device: torch.device, folder: Path) -> RunSettings:
    """An artifact of random weights and a dataset of photographs; the settings of a run on them."""
    processor = make_processor(folder / "tokenizer", config.vision_config.image_size)
    make_photos(folder / "data", processor, job.samples)
    make_artifact(config, processor, device, folder / "artifact")
    return job_settings(job, device, folder)


def make_artifact(config: MQWenConfig, processor: MQWenProcessor, device: torch.device, folder: Path) -> None:
    """Random weights, made on the device."""
    config = deepcopy(config)
    config.image_token_id = processor.tokenizer.image_token_id
    with torch.device(device):
        model = MQWenLMHeadModel(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def job_settings(job: Job, device: torch.device, folder: Path) -> RunSettings:
    """Of a run that starts from the folder's artifact/ and trains on its data/."""
    base, cuda = recipe("sft-full"), device.type == "cuda"
    return replace(
        base,
        name="job",
        runs=str(folder / "runs"),
        steps=job.steps,
        log_every=1,
        model=replace(base.model, init_from=str(folder / "artifact"), precision="bfloat16" if cuda else "float32"),
        data=replace(
            base.data,
            dataset=str(folder / "data"),
            pack_length=job.length,
            packs_per_row=job.packs,
            rows_per_step=job.passes,
        ),
        parallel=replace(base.parallel, gpus_per_worker=int(cuda)),
        compute=ComputeSettings(compile=job.compiled),
        checkpoint=replace(base.checkpoint, every=10**9),
    )


def first_rows(settings: RunSettings, order: Order, processor: MQWenProcessor) -> list[Batch]:
    """Those that the run will train on."""
    assert settings.steps is not None
    wanted, reader = settings.steps * settings.data.rows_per_step, WindowReader(order, processor, Position())
    tables: list[Any] = []
    with ThreadPoolExecutor(THREADS) as threads:
        for window in itertools.count(step=THREADS):
            for some in threads.map(lambda n: list(reader.rows(n)), range(window, window + THREADS)):
                tables += some
            if len(tables) >= wanted:
                break
    return [unpack(table, settings.data.packs_per_row, processor.image_size) for table in tables[:wanted]]


def without_ray(settings: RunSettings, config: MQWenConfig, device: torch.device, rows: list[Batch]) -> Loop:
    torch._dynamo.reset()
    cost = cost_of(outline(settings, config))
    with one_process(device):
        model = build_model(settings, config).to(device).train()
        strategy = make_strategy(model, list(model.transformer.h), settings)
        return bare_loop(settings, strategy, iter(rows), rows[0], flops_of=cost.of)


def under_ray(settings: RunSettings, config: MQWenConfig, processor: MQWenProcessor) -> tuple[Loop, int]:
    """As mqwen.training tells it, on a cluster without a dashboard; and the worker's peak memory in bytes."""
    order = order_of(settings, config.image_positions)
    assert settings.steps is not None
    stream = Stream(order, processor, settings.steps * settings.data.rows_per_step)
    feed = Feed(
        split=lambda progress, workers: stream.split(Position(), workers),
        rows=lambda part, progress: stream.read(part, Position(), settings.data.max_bad),
        blank=stream.blank(),
    )
    with open_run(settings, config, processor) as run, cluster(cpus=4, dashboard=False):
        train_run(settings, run, config, feed, cost_of(outline(settings, config)))
        known = [field.name for field in fields(StepRecord)]
        lines = read_metrics(run)
    records = [StepRecord(**{name: line[name] for name in known}) for line in lines]
    loop = Loop(records, {}, sum(record.seconds for record in records[:WARM_STEPS]))
    loop.split["data"] = sum(record.data_wait for record in loop.measured) / len(loop.measured)
    return loop, max(line["memory"] for line in lines)
