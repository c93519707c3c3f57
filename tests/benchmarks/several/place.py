"""What trainings and replicas need, made on the machine: a vocabulary, shards of photographs, random weights."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from mqwen.model import MQWenConfig, MQWenProcessor, MQWenTokenizer
from mqwen.model.configuration import CLIP_VIT_L_14
from mqwen.train.settings import RunSettings
from tests.benchmarks.h200.measure import ceilings, machine
from tests.benchmarks.h200.whole_job import Job, job_settings, make_artifact
from tests.benchmarks.reading import make_photos, make_processor
from tests.benchmarks.train_h200 import TINY

ROOM = 150e9  # bytes that a few checkpoints and Ray's object store take


@dataclass(frozen=True)
class Place:
    """`settings` are those of one worker's run from artifact/ in the folder; small/ is a model of two layers. `gpus` is
    how many there are, `about` says what is measured on."""

    folder: Path
    settings: RunSettings
    gpus: int
    about: dict[str, str]

    @property
    def small(self) -> RunSettings:
        return replace(self.settings, model=replace(self.settings.model, init_from=str(self.folder / "small")))


def cpus_per_worker() -> int:
    """Half of the cores are for eight workers, the others for those who read."""
    return max(1, (os.cpu_count() or 1) // 16)


@contextmanager
def made_place(job: Job, tokenizer: Path | None, tiny: bool) -> Iterator[Place]:
    """In memory where there is much of it: what a checkpoint's disk can do is no matter here."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > ROOM and not tiny
    # Made in a process of its own: the GPU that it makes weights on is others' afterwards.
    with (
        tempfile.TemporaryDirectory(prefix="several-", dir=memory if roomy else None) as folder,
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        place = pool.submit(_make, Path(folder), job, tokenizer, tiny).result()
        pool.shutdown()
        yield place


def _make(folder: Path, job: Job, tokenizer: Path | None, tiny: bool) -> Place:
    gpu = torch.cuda.is_available() and not tiny
    device, config = torch.device("cuda" if gpu else "cpu"), deepcopy(TINY) if tiny else MQWenConfig()
    side = config.vision_config.image_size
    if tokenizer:
        processor = MQWenProcessor(MQWenTokenizer.from_pretrained(tokenizer), image_size=side)
    else:
        processor = make_processor(folder / "tokenizer", side)
    if tiny:
        config.vocab_size = processor.tokenizer.vocab_size  # or a replica would give tokens that no text has
    make_photos(folder / "data", processor, job.samples)
    make_artifact(config, processor, device, folder / "artifact")
    less = config
    if not tiny:
        sizes = {"hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 5504, "num_hidden_layers": 2}
        less = MQWenConfig(**sizes, vision_config=CLIP_VIT_L_14 | {"num_hidden_layers": 2})
    make_artifact(less, processor, device, folder / "small")
    found = ceilings(device, *((64, 0.01) if tiny else (8192, 0.5)))
    gpus = torch.cuda.device_count() if gpu else 0
    about = machine(device) | {
        "GPUs": str(gpus),
        "cores": str(os.cpu_count()),
        "bf16 product": f"{found.product / 1e12:.4g} TFLOP/s of one device",
        "copy": f"{found.copy / 1e12:.3g} TB/s, read and written",
    }
    settings = job_settings(job, device, folder)
    parallel = replace(settings.parallel, cpus_per_worker=cpus_per_worker(), wait_for_resources=60.0)
    return Place(folder, replace(settings, parallel=parallel), gpus, about)
