"""Training and serving on 1, 2, 4, 8 GPUs of one machine: `PYTHONPATH=platform:. python tests/benchmarks/scale.py`.

`--parts`, each for the numbers of GPUs that `--gpus` names, largest first where time is short:

fsdp2    weak scaling: the real job (recipe sft-full, Qwen-1.8B with CLIP-L, random weights, photographs in shards)
         under Ray Train, the same rows a GPU; with several, a checkpoint on the way, whose stall is what the time from
         a step's end to the next one's grew by; then a traced step
zero3    the same with DeepSpeed's ZeRO-3
digest   a small model's run on the same global batch: what its loops received, beside what a plain loop reads
serve    replicas with a GPU each under Ray Serve, and conversations by OpenAI's client in other processes; with
         RAY_SERVE_ENABLE_HA_PROXY=1 in the environment, through HAProxy
kill     SIGKILL of a rank at the largest number: seconds to the next step, goodput
elastic  a small model's run that loses a node with half of its GPUs, and gets another
plan     needs no GPU: what a worker of 8 and of 64 holds, and what it gathers and reduces in a step

Exposed communication is the time of the traced step, on rank 0, in which a collective ran and no other kernel did: an
upper bound, as it holds what that rank waited for others, and what tracing itself delays. Beside it stands the plain
difference to one GPU's step, which nothing was traced in.

Writes a dated Markdown file and the same as JSON into `--out` after each case; what a file of that day holds there
already stays. `--join` takes in other such files. `--tiny` shows on a CPU, with gloo, that all of it runs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from mqwen.model import MQWenConfig
from tests.benchmarks.h200.measure import attempt
from tests.benchmarks.h200.whole_job import Job
from tests.benchmarks.several import replicas, trainings
from tests.benchmarks.several.job import NO_MULTICAST
from tests.benchmarks.several.place import Place, made_place
from tests.benchmarks.several.replicas import Talk
from tests.benchmarks.several.report import Case, Results
from tests.benchmarks.train_h200 import TINY

PARTS = ("fsdp2", "zero3", "digest", "serve", "kill", "elastic", "plan")
PLANNED = (8, 64)
ON_ONE_CLUSTER = ("fsdp2", "zero3", "digest", "kill")
RESULTS = Path(__file__).parent / "results"

Work = Callable[[], Iterator[Case]]


def works(part: str, place: Place, job: Job, talk: Talk, gpus: list[int]) -> Iterator[tuple[str, Work]]:
    """What a part consists of, by name."""
    most = max(gpus)
    match part:
        case "fsdp2" | "zero3":
            for count in gpus:
                yield f"{part} {count}", lambda count=count: one(trainings.weak(place, job, part, count))
        case "digest":
            yield part, partial(trainings.same_samples, place, gpus)
        case "serve":
            for count in gpus:
                yield f"{part} {count}", partial(replicas.serve, place, talk, count)
        case "kill":
            yield part, lambda: one(trainings.kill(place, job, most))
        case "elastic":
            yield part, lambda: one(trainings.elastic(place, most))


def one(case: Case) -> Iterator[Case]:
    yield case


@dataclass
class Measuring:
    """Each case is written when it is there; one that fails says so and is left out. None begins after `end`."""

    results: Results
    end: float

    def measure(self, name: str, work: Work) -> None:
        began = time.monotonic()
        if began > self.end:
            print(f"== {name}: left out, the time is up", flush=True)
            return
        print(f"== {name}", flush=True)
        attempt(name, lambda: [self.results.add(case) for case in work()])
        print(f"== {name} took {time.monotonic() - began:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="in the order to be run")
    parser.add_argument("--gpus", nargs="*", type=int, default=[1, 2, 4, 8], help="in the order to be run")
    parser.add_argument("--packs", type=int, default=8, help="of 2048 positions, in a forward pass")
    parser.add_argument("--passes", type=int, default=4, help="of a GPU in a step")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of weak scaling")
    parser.add_argument("--tokenizer", type=Path, help="folder with a qwen.tiktoken; serve needs it")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case begins later")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--join", nargs="*", type=Path, default=[], help="JSON files of earlier results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    results = Results(given.out)
    results.join(given.join)
    results.write()
    measuring = Measuring(results, time.monotonic() + 60 * given.minutes)
    if "serve" in given.parts and not (given.tokenizer or given.tiny):
        parser.error("serve needs --tokenizer, a folder with a qwen.tiktoken: tokens are to be words")
    job = Job.tiny() if given.tiny else Job(given.packs, passes=given.passes, steps=given.steps, samples=4096)
    if "plan" in given.parts:
        from tests.benchmarks.several import counts  # it rests on torch's own tools, which other parts do not need

        for workers in PLANNED:
            plan = partial(counts.plan, TINY if given.tiny else MQWenConfig(), job, workers)
            measuring.measure(f"plan {workers}", lambda plan=plan: one(plan()))
    if parts := [part for part in given.parts if part != "plan"]:
        measure_on(parts, given, job, measuring)


def measure_on(parts: list[str], given: argparse.Namespace, job: Job, measuring: Measuring) -> None:
    """On this machine's GPUs, as many of those asked for as there are; on a CPU two processes at most."""
    os.environ |= NO_MULTICAST
    talk = Talk.tiny() if given.tiny else Talk()
    with made_place(job, given.tokenizer, given.tiny) as place:
        measuring.results.about |= place.about
        gpus = [count for count in given.gpus if count <= (place.gpus or 2)]
        for shared, some in groupby(parts, lambda part: part in ON_ONE_CLUSTER):
            with trainings.own_cluster(max(gpus)) if shared else nullcontext():
                for part in some:
                    for name, work in works(part, place, job, talk, gpus):
                        measuring.measure(name, work)


if __name__ == "__main__":
    main()
