"""A run whose workers are killed again and again, beside an undisturbed one: the same weights, and what it costs.

python -m tests.benchmarks.kill_loop [--kills 10] [--steps 1400] [--empty 5]

SIGKILL to a random worker every 20 to 40 seconds. Goodput is the share of the time, from the first step's end on, that
went into steps that count.
Beside the time from a kill to the next step stands that of an empty torch worker group (restart.py), on the same
cluster.
"""

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from mqwen.cluster import cluster
from mqwen.data.order import Place
from mqwen.data.reader import WindowReader
from mqwen.data.sources.digits import vocabulary_texts
from mqwen.model import MQWenConfig, MQWenLMHeadModel
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from mqwen.storage import Location, locate
from mqwen.train import checkpoint
from mqwen.train.records import read_metrics
from mqwen.train.run import SETTINGS
from mqwen.training import reader_of
from tests.benchmarks.killing import ROOT, Kills, follow
from tests.benchmarks.restart import empty_kill_to_next_step
from tests.benchmarks.result import write_result

PAUSE = (20.0, 40.0)  # seconds


@dataclass(frozen=True)
class KillLoop:
    """`empty` is how often an empty worker group is killed, some times before each run and after both."""

    kills: int = 10
    steps: int = 1400
    empty: int = 5
    every: int = 20
    seed: int = 0


def train(
    command: list[str], environment: dict[str, str], kills: int, chance: random.Random
) -> tuple[float, list[float]]:
    """Seconds from the first step's end to the run's, and from each kill to the next step."""
    pause = chance.uniform(*PAUSE)

    def due(line: str, since: float) -> bool:
        nonlocal pause
        if since < pause:
            return False
        pause = chance.uniform(*PAUSE)
        return True

    killing = Kills(kills, due, chance.choice)
    follow(command, environment, killing)
    assert killing.began is not None
    return time.monotonic() - killing.began, killing.took


def weights(run: Location) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = MQWenLMHeadModel(MQWenConfig.from_pretrained(f"{run}/model"))
    state = model.to_empty(device="cpu").state_dict()
    checkpoint.load(checkpoint.committed(run)[-1], {"model": state})
    return state


def check_samples(run: Location, records: list[dict[str, Any]]) -> float:
    """Raises where a step did not train on the order's next rows, or a sample was seen twice in an epoch, or not at all
    in one that is over. Returns how many epochs the steps are."""
    reader, _ = reader_of(run, 1)
    rows, seen = rows_of(reader), Counter[tuple[int, str]]()
    per_step = json.loads((run / SETTINGS).read_bytes())["data"]["rows_per_step"]
    for record in records:
        step = list(itertools.islice(rows, per_step))
        assert tuple(record["place"]) == step[-1][0], f"step {record['step']} ended at {record['place']}"
        assert record["images"] == sum(sample.images for _, samples in step for sample in samples)
        seen.update((place[0], sample.key) for place, samples in step for sample in samples)
    assert max(seen.values()) == 1
    each, epoch = Counter(epoch for epoch, _ in seen), records[-1]["place"][0]
    assert all(each[over] == reader.order.datasets[0].manifest.samples for over in range(epoch))
    return seen.total() / reader.order.datasets[0].manifest.samples


def rows_of(reader: WindowReader) -> Iterator[tuple[tuple[int, int, int], list[Place]]]:
    """The place of each row of the order, and its samples."""
    for number in itertools.count():
        plan = reader.plan(number)
        for row, packs in enumerate(plan.rows):
            yield (*reader.place(number), row), [plan.samples[i] for pack in packs for i in pack]


def main() -> None:
    settings = tyro.cli(KillLoop, description=__doc__)
    chance = random.Random(settings.seed)
    with tempfile.TemporaryDirectory() as folder, cluster(cpus=6, show_workers=False) as address:
        environment = {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT / "platform")}
        train_vocabulary(vocabulary_texts(), 400, Path(folder) / VOCABULARY_FILE)
        dataset = [sys.executable, "jobs/ingest.py", "digits", "--dataset", f"{folder}/data", "--pictures", "3000"]
        subprocess.run([*dataset, "--tokenizer", folder], env=os.environ | environment, cwd=ROOT, check=True)
        words = ["--recipe", "demo", "--data.dataset", f"{folder}/data", "--runs", f"{folder}/runs", "--log-every", "1"]
        words += ["--tokenizer", folder, "--steps", str(settings.steps), "--checkpoint.every", str(settings.every)]
        words += ["--parallel.max-failures", "100"]
        lines, runs, empty = [], {}, list[float]()

        def kill_empty_groups(times: int) -> None:
            for _ in range(times):
                empty.append(empty_kill_to_next_step(f"{folder}/empty-{len(empty)}", environment))

        for name, kills in (("undisturbed", 0), ("killed", settings.kills)):
            kill_empty_groups(settings.empty // 2)
            command = [sys.executable, "jobs/pretrain.py", *words, "--name", name]
            seconds, took = train(command, environment, kills, chance)
            run = locate(f"{folder}/runs/{name}")
            records = read_metrics(run)
            assert [record["step"] for record in records] == list(range(1, settings.steps + 1))
            runs[name] = records, weights(run), check_samples(run, records)
            goodput = sum(record["seconds"] for record in records[1:]) / seconds
            lines.append(f"| {name} | {len(took)} | {seconds:.0f} s | {goodput:.0%} | {shown(took)} |")
        kill_empty_groups(settings.empty - len(empty))
    lines.append(f"| empty worker group | {len(empty)} | | | {shown(empty)} |")
    (records, found, epochs), (expected_records, expected, _) = runs["killed"], runs["undisturbed"]
    difference = max((found[name] - expected[name]).abs().max().item() for name in expected)
    losses = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(records, expected_records, strict=True))
    table = "| run | kills | time | goodput | kill to next step, median |\n|---|---|---|---|---|\n" + "\n".join(lines)
    ratio = statistics.median(took) / statistics.median(empty)
    write_result(
        "kill-loop",
        f"{table}\n\nKill to next step: {', '.join(f'{one:.1f}' for one in took)} s. The median is {ratio:.2f} times "
        "the empty group's; at most 1.3 is aimed at.\n\n"
        f"Final weights: largest difference {difference:.3g}. Losses of the steps that count: largest relative "
        f"difference {losses:.3g}. They are {epochs:.1f} epochs: every sample was seen once in each that is over, and "
        "at most once in the last.",
    )


def shown(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})" if seconds else ""


if __name__ == "__main__":
    main()
