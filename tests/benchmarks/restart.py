"""From SIGKILL of a training worker to the next step, beside an empty torch worker group restarted in the same run.

python -m tests.benchmarks.restart [--rounds 3]

Both run on one cluster of this machine, by turns: the demo's training on a small dataset, and a worker group of the
same size, with the same settings of Ray, that only counts. Of each, one worker is killed once it is at work, and the
time is taken until the group works again.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from mqwen.cluster import cluster
from mqwen.data.sources.digits import vocabulary_texts
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from tests.benchmarks.killing import ROOT, training_workers
from tests.benchmarks.result import write_result

EMPTY = """
import time
from mqwen.cluster import cluster
import ray.train
from ray.train.torch import TorchTrainer

def work():
    for step in range(10**6):
        if ray.train.get_context().get_world_rank() == 0:
            print(f"step {step}/", flush=True)
        time.sleep(0.05)

with cluster(cpus=4):
    TorchTrainer(
        work,
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(storage_path="FOLDER", failure_config=ray.train.FailureConfig(max_failures=3)),
    ).fit()
"""


@dataclass(frozen=True)
class Restart:
    rounds: int = 3


def kill_to_next_step(command: list[str], environment: dict[str, str], first: str, at_work: float = 0.0) -> float:
    """Seconds. The kill comes with the first line that `first` finds after `at_work` seconds of work, the end with the
    next line that shows a step."""
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    killed, began, said = None, None, ""
    before: set[int] = set()
    try:
        for line in process.stdout:
            said += line
            if began is None and re.search(r"step \d+/", line):
                began = time.monotonic()
            if killed is None and began and time.monotonic() - began > at_work and re.search(first, line):
                workers = training_workers()
                before = {worker.pid for worker in workers}
                workers[-1].kill()
                killed = time.monotonic()
            elif killed and re.search(r"step \d+/", line):
                pid = re.search(r"pid=(\d+)", line)
                if pid and int(pid[1]) not in before:
                    return time.monotonic() - killed
    finally:
        # As Ctrl-C does, on which Ray Train gives back what it had reserved. A killed driver's stays reserved for three
        # minutes, and of this small cluster nothing would be left for the next round's reading.
        process.send_signal(signal.SIGINT)
        process.communicate()
    raise RuntimeError(f"{command} ended without a step after the kill:\n{said[-3000:]}")


def empty_kill_to_next_step(folder: str, environment: dict[str, str]) -> float:
    """Seconds that an empty torch worker group takes."""
    command = [sys.executable, "-c", EMPTY.replace("FOLDER", folder)]
    return kill_to_next_step(command, environment, r"step 20/")


def main() -> None:
    settings = tyro.cli(Restart, description=__doc__)
    with tempfile.TemporaryDirectory() as folder, cluster(cpus=6, show_workers=False) as address:
        environment = {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT / "platform")}
        train_vocabulary(vocabulary_texts(), 400, Path(folder) / VOCABULARY_FILE)
        dataset = [sys.executable, "jobs/ingest.py", "digits", "--dataset", f"{folder}/data", "--pictures", "600"]
        subprocess.run([*dataset, "--tokenizer", folder], env=os.environ | environment, cwd=ROOT, check=True)
        found: dict[str, list[float]] = {"training": [], "empty": []}
        for number in range(settings.rounds):
            words = ["--recipe", "demo", "--data.dataset", f"{folder}/data", "--runs", f"{folder}/runs"]
            words += ["--tokenizer", folder, "--name", f"run-{number}", "--log-every", "1", "--checkpoint.every", "10"]
            training = [sys.executable, "jobs/pretrain.py", *words]
            found["training"].append(kill_to_next_step(training, environment, r"step \d+: checkpoint", 60))
            found["empty"].append(empty_kill_to_next_step(f"{folder}/empty-{number}", environment))
            print(
                f"round {number + 1}: " + ", ".join(f"{what} {times[-1]:.1f} s" for what, times in found.items()),
                flush=True,
            )
    medians = {what: statistics.median(times) for what, times in found.items()}
    rows = [f"| {what} | {', '.join(f'{one:.1f}' for one in found[what])} | {medians[what]:.1f} |" for what in found]
    table = "| workers | seconds from kill to next step | median |\n|---|---|---|\n" + "\n".join(rows)
    write_result("restart", f"{table}\n\nRatio {medians['training'] / medians['empty']:.2f}; at most 1.3 is aimed at.")


if __name__ == "__main__":
    main()
