"""Ingest, train, export as a user runs them, on one cluster: the same losses for a seed, also through faults."""

import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import pytest

from mqwen.data.manifest import read_manifest
from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from mqwen.storage import locate
from mqwen.telemetry import reading, training
from mqwen.train.report import read_metrics
from tests.end_to_end.commands import SMALL, Shell, read_until, shell
from tests.scraping import FAST, Scrape, declared, discovered, scrape_until, scraped_meanwhile

PICTURES = 300
STEPS = 60
EVERY = 5  # steps between checkpoints
HELD = """
import sys
from mqwen.cluster import cluster
with cluster(cpus=4, show_workers=False) as address:
    print("address", address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Shell]:
    """A shell whose commands all work on one cluster, which asks for a token."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with shell() as found:
        found.variables = token | FAST
        with found.start("-c", HELD, stdin=subprocess.PIPE) as process:
            address = read_until(process, "^address ").split()[-1]
            yield replace(found, variables=token | {"RAY_ADDRESS": address})
            process.communicate(timeout=60)


@dataclass
class Place:
    shell: Shell
    tokenizer: Path
    dataset: Path
    runs: Path

    def command(self, name: str, *more: object) -> list[object]:
        places = ["--tokenizer", self.tokenizer, "--data.dataset", self.dataset, "--runs", self.runs, "--name", name]
        sizes = ["--parallel.workers", 2, "--steps", STEPS, "--checkpoint.every", EVERY, "--log-every", 1]
        return ["jobs/pretrain.py", *SMALL, *places, *sizes, *more]


@pytest.fixture(scope="module")
def place(cluster: Shell, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("commands")
    words = ["--tokenizer", tokenizer, "--dataset", folder / "data", "--pictures", PICTURES]
    output = cluster.done("jobs/ingest.py", "digits", *words, "--settings.shard-samples", 100)
    assert f"{folder / 'data'}: {PICTURES} samples" in output.splitlines()[-1]
    assert read_manifest(locate(folder / "data")).samples == PICTURES
    return Place(cluster, tokenizer, folder / "data", folder / "runs")


def losses(output: str) -> dict[int, str]:
    """The loss of each step, as printed; a step printed twice must have the same one."""
    found: dict[int, str] = {}
    for step, loss in re.findall(rf"step (\d+)/{STEPS} +loss (\S+)", output):
        assert found.setdefault(int(step), loss) == loss
    return found


@pytest.fixture(scope="module")
def started() -> float:
    return time.time()


@pytest.fixture(scope="module")
def scraped() -> list[Scrape]:
    """What the cluster's metrics were during the first run."""
    return []


@pytest.fixture(scope="module")
def printed(place: Place, scraped: list[Scrape], started: float) -> dict[str, str]:
    """What two undisturbed runs of unlike seeds print."""
    shorter = ["--seed", 1, "--steps", 1, "--parallel.workers", 1]
    with scraped_meanwhile(discovered(place.shell.ray_folder)) as found:
        first = place.shell.done(*place.command("first"))
    scraped += found
    return {"first": first, "other": place.shell.done(*place.command("other", *shorter))}


def test_a_run_prints_each_step_and_learns(printed: dict[str, str], place: Place) -> None:
    found = losses(printed["first"])
    assert list(found) == list(range(1, STEPS + 1))
    assert float(found[STEPS]) < 0.8 * float(found[1])
    records = read_metrics(locate(place.runs / "first"))
    assert [f"{record['loss']:.6f}" for record in records] == list(found.values())
    assert f"run {place.runs}/first: {STEPS} steps in " in printed["first"].splitlines()[-1]
    assert (place.runs / "first" / "loss.png").stat().st_size > 1000


def test_the_metrics_are_those_of_the_runs_file(
    printed: dict[str, str], place: Place, scraped: list[Scrape], started: float
) -> None:
    records = read_metrics(locate(place.runs / "first"))

    def seen(name: str) -> set[float]:
        return {value for one in scraped for value in one.values(f"ray_mqwen_train_{name}", run="first")}

    for field in ("step", "loss", "learning_rate", "gradient_norm"):
        assert seen(field)
        assert seen(field) <= {record[field] for record in records}
    for field in ("positions", "tokens", "images"):  # what came out is the sum up to some step
        assert seen(f"{field}_total")
        assert seen(f"{field}_total") <= set(accumulate(record[field] for record in records))
    assert max(seen("step_seconds_count")) in range(1, STEPS + 1)
    assert 0 < max(seen("data_wait_seconds_total")) <= sum(record["data_wait"] for record in records)
    assert all(started < moment < time.time() for moment in seen("last_checkpoint_timestamp_seconds"))
    assert max(seen("checkpoint_seconds_count")) in range(1, STEPS // EVERY + 1)
    assert seen("worker_group_starts_total") == {1}
    names = set[tuple[str, str, str]]().union(*(one.declared() for one in scraped))
    assert declared(training) <= names <= declared(training) | declared(reading)

    read = scrape_until(
        discovered(place.shell.ray_folder),
        lambda one: one.total("ray_mqwen_data_rows_total", dataset="data") >= 3 * STEPS,
    )
    assert read.total("ray_mqwen_data_samples_total", dataset="data") >= PICTURES
    assert read.total("ray_mqwen_data_read_bytes_total", dataset="data") > 100 * PICTURES
    assert read.total("ray_mqwen_data_read_seconds_count", dataset="data") > 1


def test_another_seed_prints_other_losses(printed: dict[str, str]) -> None:
    other = re.search(r"step 1/1 +loss (\S+)", printed["other"])
    assert other is not None
    assert other[1] != losses(printed["first"])[1]


def test_a_killed_run_goes_on_with_the_same_losses(printed: dict[str, str], place: Place) -> None:
    """SIGKILL of the whole job, then of one of the two workers that go on in its place."""
    expected = losses(printed["first"])
    with place.shell.start(*place.command("killed")) as process:
        before = read_until(process, rf"step {2 * EVERY}: checkpoint")
        os.killpg(process.pid, signal.SIGKILL)
    assert set(range(1, 2 * EVERY + 1)) <= losses(before).keys() < expected.keys()
    assert losses(before).items() <= expected.items()

    with place.shell.start(*place.command("killed")) as process:
        again = read_until(process, r"step \d+/")
        resumed = re.search(r"resumed from \S+step-(\d+)", again)
        assert resumed is not None, again
        start = int(resumed[1])
        assert start >= 2 * EVERY
        assert start % EVERY == 0
        workers = [one for one in place.shell.processes() if "TrainWorker" in " ".join(one.cmdline())]
        assert len(workers) == 2
        workers[-1].kill()
        assert process.stdout is not None
        again += process.stdout.read()
        assert process.wait(60) == 0, again
    assert again.count("resumed from") == 2
    assert losses(again) == {step: loss for step, loss in expected.items() if step > start}
    scrape_until(
        discovered(place.shell.ray_folder),
        lambda one: one.total("ray_mqwen_train_worker_group_starts_total", run="killed") == 3,
    )
    records = read_metrics(locate(place.runs / "killed"))
    assert [f"{record['loss']:.6f}" for record in records] == list(expected.values())


def test_a_name_in_use_with_other_settings_is_refused(printed: dict[str, str], place: Place) -> None:
    code, output = place.shell.run(*place.command("first", "--seed", 3))
    assert code == 2
    assert f"error: run {place.runs}/first exists with other settings (seed); give another --name" in output
    assert "Traceback" not in output


def test_an_export_is_an_artifact(printed: dict[str, str], place: Place, tmp_path: Path) -> None:
    output = place.shell.done("jobs/export.py", "--run", place.runs / "first", "--to", tmp_path / "artifact")
    assert output.splitlines()[-1] == f"{tmp_path}/artifact: the weights of step {STEPS}"
    names = {path.name for path in (tmp_path / "artifact").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken"}
    model = MQWenLMHeadModel.from_pretrained(tmp_path / "artifact")
    processor = MQWenProcessor.from_pretrained(tmp_path / "artifact")
    assert model.config.vision_config.image_size == processor.image_size == 48
    assert model.config.vocab_size >= processor.tokenizer.vocab_size
