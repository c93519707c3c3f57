"""A run whose workers are killed again and again, beside an undisturbed one: the same weights, and what it costs.

python -m tests.benchmarks.kill_loop [--kills 10] [--steps 700]

SIGKILL to a random worker every 20 to 40 seconds. Goodput is the share of the time that went into steps that count.
"""

import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import tyro

from mqwen.cluster import cluster
from mqwen.data.sources.digits import vocabulary_texts
from mqwen.model import MQWenConfig, MQWenLMHeadModel
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from mqwen.storage import Location, locate
from mqwen.train import checkpoint
from mqwen.train.records import read_metrics
from tests.benchmarks.restart import ROOT
from tests.benchmarks.result import write_result

PAUSE = (20.0, 40.0)  # seconds


@dataclass(frozen=True)
class KillLoop:
    kills: int = 10
    steps: int = 700
    every: int = 20
    seed: int = 0


def train(
    command: list[str], environment: dict[str, str], kills: int, chance: random.Random
) -> tuple[float, list[float]]:
    """Seconds from the first step to the end, and from each kill to the next step."""
    first, killed, took, old = None, None, list[float](), set[int]()
    with subprocess.Popen(
        command, env=os.environ | environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        due, said = float("inf"), ""
        for line in process.stdout:
            said, now = said[-5000:] + line, time.monotonic()
            if (pid := re.search(r"pid=(\d+).*step \d+/", line)) and int(pid[1]) not in old:
                if first is None or killed is not None:
                    due = now + chance.uniform(*PAUSE)
                first = first or now
                if killed is not None:
                    took.append(now - killed)
                    killed = None
            if now >= due and len(took) < kills and killed is None:
                workers = [one for one in psutil.process_iter() if "RayTrainWorker" in " ".join(one.cmdline())]
                old |= {one.pid for one in workers}
                chance.choice(workers).kill()
                killed = now
    if process.returncode or first is None:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{said}")
    return time.monotonic() - first, took


def weights(run: Location) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = MQWenLMHeadModel(MQWenConfig.from_pretrained(f"{run}/model"))
    state = model.to_empty(device="cpu").state_dict()
    checkpoint.load(checkpoint.committed(run)[-1], {"model": state})
    return state


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
        lines, runs = [], {}
        for name, kills in (("undisturbed", 0), ("killed", settings.kills)):
            command = [sys.executable, "jobs/pretrain.py", *words, "--name", name]
            seconds, took = train(command, environment, kills, chance)
            run = locate(f"{folder}/runs/{name}")
            records = read_metrics(run)
            assert [record["step"] for record in records] == list(range(1, settings.steps + 1))
            runs[name] = records, weights(run)
            goodput = sum(record["seconds"] for record in records) / seconds
            median = f"{statistics.median(took):.1f} s ({min(took):.1f} to {max(took):.1f})" if took else ""
            lines.append(f"| {name} | {len(took)} | {seconds:.0f} s | {goodput:.0%} | {median} |")
    (records, found), (expected_records, expected) = runs["killed"], runs["undisturbed"]
    difference = max((found[name] - expected[name]).abs().max().item() for name in expected)
    losses = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(records, expected_records, strict=True))
    same = all(
        [one[name] for one in records] == [one[name] for one in expected_records]
        for name in ("tokens", "positions", "images")
    )
    table = "| run | kills | time | goodput | kill to next step, median |\n|---|---|---|---|---|\n" + "\n".join(lines)
    write_result(
        "kill-loop",
        f"{table}\n\nFinal weights: largest difference {difference:.3g}. Losses of the steps that count: largest "
        f"relative difference {losses:.3g}. The same samples in every step: {'yes' if same else 'NO'}.",
    )


if __name__ == "__main__":
    main()
