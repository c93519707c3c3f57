"""The whole way on two nodes with a token, data and runs in object storage: submit, faults, export, serve."""

import base64
import io
import json
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import httpx
import openai
import pytest
import ray
from PIL import Image

from mqwen.demo.serving import served
from mqwen.demo.stages import Stages
from mqwen.release.client import Chat, Server, ask
from mqwen.storage import locate
from mqwen.telemetry import reading, training
from mqwen.train.checkpoint import committed, read_commit
from mqwen.train.provenance import last_start
from mqwen.train.records import read_evaluations, read_metrics
from tests.end_to_end.commands import ROOT, SMALL, read_until
from tests.end_to_end.nodes import Cluster, cluster, free_port
from tests.end_to_end.place import COLOURS, EVERY, PICTURES, QUESTION, STEPS, Place, losses, make_place
from tests.scraping import Scrape, declared, discovered, scrape_until, scraped_meanwhile


@pytest.fixture(scope="module")
def nodes(moto: str) -> Iterator[Cluster]:
    with cluster(moto) as found:
        yield found


@pytest.fixture(scope="module")
def place(nodes: Cluster, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(nodes, tokenizer, tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def started() -> float:
    return time.time()


@pytest.fixture(scope="module")
def scraped() -> list[Scrape]:
    """What the cluster's metrics were during the first run."""
    return []


def evaluated(place: Place) -> list[object]:
    return ["--evaluation.dataset", place.dataset, "--evaluation.every", 2 * EVERY]


@pytest.fixture(scope="module")
def submitted(place: Place, scraped: list[Scrape], started: float) -> str:
    """What `ray job submit` prints of an undisturbed run."""
    with scraped_meanwhile(discovered(place.cluster.shell.ray_folder)) as found:
        job = place.cluster.submit("python", *place.options("first", *evaluated(place), "--profile", 3))
    assert job.returncode == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout
    scraped += found
    return job.stdout


def test_a_submitted_run_prints_each_step_and_learns(submitted: str, place: Place) -> None:
    found = losses(submitted)
    assert list(found) == list(range(1, STEPS + 1))
    assert float(found[STEPS]) < 0.5 * float(found[1])
    run = locate(place.runs) / "first"
    records = read_metrics(run)
    assert [f"{record['loss']:.6f}" for record in records] == list(found.values())
    assert f"run {run}: {STEPS} steps in " in submitted
    assert ((run / "loss.png").size() or 0) > 1000
    saved = [read_commit(one).progress.step for one in committed(run)]
    assert 1 <= len(saved) <= 3
    assert saved[-1] == STEPS
    assert not [step for step in saved if step % EVERY]
    assert b"held-out loss, last" in (run / "report.html").read_bytes()
    held_out = {str(one["step"]): f"{one['loss']:.6f}" for one in read_evaluations(run)}
    assert list(held_out) == [str(step) for step in range(2 * EVERY, STEPS + 1, 2 * EVERY)]
    assert held_out == dict(re.findall(r"step (\d+): held-out loss (\S+)", submitted))
    assert (run / "profile").names() == ["step-00000003.memory.txt", "step-00000003.trace.json.gz"]
    assert (run / "tensorboard").names()[0] == "events.out.tfevents.step-00000001"
    start = last_start(run)
    assert start is not None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (start.commit or "").removesuffix("-dirty") == commit
    assert start.packages["ray"] == ray.__version__


def test_without_the_token_nothing_is_taken(nodes: Cluster) -> None:
    job = nodes.submit("python", "jobs/pretrain.py", "--recipe", "demo", token=secrets.token_hex(32))
    assert job.returncode != 0
    assert "Invalid authentication token" in job.stderr


def test_the_metrics_are_those_of_the_runs_file(
    submitted: str, place: Place, scraped: list[Scrape], started: float
) -> None:
    records = read_metrics(locate(place.runs) / "first")

    def seen(name: str) -> set[float]:
        return {value for one in scraped for value in one.values(f"ray_mqwen_train_{name}", run="first")}

    for field in ("step", "loss", "learning_rate", "gradient_norm", "mfu", "goodput"):
        assert seen(field)
        assert seen(field) <= {record[field] for record in records}
    for field in ("positions", "tokens", "images"):  # what came out is the sum up to some step
        assert seen(f"{field}_total")
        assert seen(f"{field}_total") <= set(accumulate(record[field] for record in records))
    assert max(seen("step_seconds_count")) in range(1, STEPS + 1)
    assert seen("memory_bytes") <= {record["memory"] for record in records}
    assert seen("held_out_loss") <= {one["loss"] for one in read_evaluations(locate(place.runs) / "first")}
    assert 0 < max(seen("data_wait_seconds_total")) <= sum(record["data_wait"] for record in records)
    assert all(started < moment < time.time() for moment in seen("last_checkpoint_timestamp_seconds"))
    assert seen("last_step_timestamp_seconds") <= {record["time"] for record in records}
    assert max(seen("checkpoint_seconds_count")) in range(1, STEPS // EVERY + 1)
    assert seen("worker_group_starts_total") == {1}
    names = set[tuple[str, str, str]]().union(*(one.declared() for one in scraped))
    usual = {one for one in declared(training) if one[0] != "ray_mqwen_train_left_out_steps"}
    assert usual <= names <= declared(training) | declared(reading)

    read = scrape_until(
        discovered(place.cluster.shell.ray_folder),
        lambda one: one.total("ray_mqwen_data_rows_total", dataset="data") >= 3 * STEPS,
    )
    assert read.total("ray_mqwen_data_samples_total", dataset="data") >= PICTURES
    assert read.total("ray_mqwen_data_read_bytes_total", dataset="data") > 100 * PICTURES
    assert read.total("ray_mqwen_data_read_seconds_count", dataset="data") > 1


@pytest.mark.soak
def test_another_seed_prints_other_losses(submitted: str, place: Place) -> None:
    shorter = ["--seed", 1, "--steps", 1, "--parallel.workers", 1]
    other = re.search(r"step 1/1 +loss (\S+)", place.cluster.shell.done(*place.options("other", *shorter)))
    assert other is not None
    assert other[1] != losses(submitted)[1]


@pytest.mark.soak
def test_what_would_come_again_ends_the_run_at_once(place: Place) -> None:
    """Whatever `max_failures` is: it is not trained again up to there."""
    more = ["--optimizer.learning-rate", 1e30, "--optimizer.warmup", 0, "--guard.most", 0]
    code, output = place.cluster.shell.run(*place.options("diverged", *more))
    assert code == 2
    for line in (r"step 1/40", r"step \d+ is left out: its "):  # each node may repeat the other's lines
        assert len(set(re.findall(rf"pid=(\d+).*{line}", output))) == 1
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: training stopped, its checkpoints stay. DivergedError: 1 of the last ")


@pytest.mark.soak
@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_deepspeed_prints_the_same_losses(submitted: str, place: Place, strategy: str) -> None:
    found = losses(place.cluster.shell.done(*place.options(strategy, "--parallel.strategy", strategy)))
    expected = [float(loss) for loss in losses(submitted).values()]
    assert [float(loss) for loss in found.values()] == pytest.approx(expected, rel=1e-3)


def test_a_recipe_for_gpus_is_refused_where_there_are_none(place: Place) -> None:
    more = ["--parallel.gpus-per-worker", 1, "--parallel.wait-for-resources", 0, "--model.precision", "bfloat16"]
    code, output = place.cluster.shell.run(*place.options("gpus", *more))
    assert code == 2
    assert "error: 2 workers with 1 CPU, 1 GPU each were asked for; the cluster has " in output
    assert "a small model can be trained without, with --parallel.gpus-per-worker 0" in output
    assert "Traceback" not in output


@pytest.mark.soak
def test_a_killed_run_goes_on_with_the_same_losses(submitted: str, place: Place) -> None:
    """SIGKILL of the whole job, then of one of the two workers that go on in its place."""
    expected, shell = losses(submitted), place.cluster.shell
    with shell.start(*place.options("killed")) as process:
        before = read_until(process, r"step (1|2)\d: checkpoint")
        os.killpg(process.pid, signal.SIGKILL)
    assert set(range(1, 2 * EVERY + 1)) <= losses(before).keys() < expected.keys()
    assert losses(before).items() <= expected.items()

    with shell.start(*place.options("killed")) as process:
        again = read_until(process, r"step \d+/")
        resumed = re.search(r"resumed from \S+step-(\d+)", again)
        assert resumed is not None, again
        start = int(resumed[1])
        assert start >= 2 * EVERY
        assert start % EVERY == 0
        workers = [one for one in shell.processes() if "TrainWorker" in " ".join(one.cmdline())]
        assert len(workers) == 2
        workers[-1].kill()
        assert process.stdout is not None
        again += process.stdout.read()
        assert process.wait(60) == 0, again
    # Two nodes on one machine share their logs, and each prints every line.
    assert len({line for line in again.splitlines() if "resumed from" in line}) == 2
    assert losses(again) == {step: loss for step, loss in expected.items() if step > start}
    scrape_until(
        discovered(place.cluster.shell.ray_folder),
        lambda one: one.total("ray_mqwen_train_worker_group_starts_total", run="killed") == 3,
    )
    records = read_metrics(locate(place.runs) / "killed")
    assert [f"{record['loss']:.6f}" for record in records] == list(expected.values())


@pytest.mark.soak
def test_a_name_in_use_with_other_settings_is_refused(submitted: str, place: Place) -> None:
    code, output = place.cluster.shell.run(*place.options("first", *evaluated(place), "--seed", 3))
    assert code == 2
    assert f"error: run {place.runs}/first exists with other settings (seed is 0, not 3); give another --name" in output
    assert "Traceback" not in output


def test_no_room_is_said(place: Place) -> None:
    more = ["--parallel.workers", 2, "--parallel.cpus-per-worker", 64, "--parallel.wait-for-resources", 0]
    code, output = place.cluster.shell.run(*place.options("large", *more))
    assert code == 2
    assert "error: 2 workers with 64 CPU each were asked for; the cluster has " in output
    assert "Traceback" not in output


EVALUATION = """
from mqwen import cli
from mqwen.cluster import cluster
from mqwen.evaluate import evaluation

evaluation.WAIT = 0

def main():
    with cluster(1):
        evaluation.Evaluation(None, None, [None] * 40, actors=evaluation.Actors(9, gpus=1)).run()

cli.run(main)
"""


def test_no_room_for_an_evaluation_is_said(place: Place) -> None:
    code, output = place.cluster.shell.run("-c", EVALUATION)
    assert code == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: 2 actors with 1 CPU, 1 GPU each were asked for; the cluster has ")
    assert line.endswith("a small model can be evaluated without, with --actors.gpus 0")
    assert "Traceback" not in output


def test_status_lists_the_runs(submitted: str, place: Place) -> None:
    words = ["--runs", place.runs, "--address", place.cluster.dashboard]
    output = place.cluster.shell.done("jobs/status.py", *words)
    (line,) = [line for line in output.splitlines() if "first" in line]
    saved = [read_commit(one).progress.step for one in committed(locate(place.runs) / "first")]
    for word in ("finished", f"{STEPS}/{STEPS}", ", ".join(map(str, saved))):
        assert word in line


@pytest.fixture(scope="module")
def artifact(submitted: str, place: Place) -> str:
    artifact = f"{place.cluster.bucket}/artifact"
    output = place.cluster.shell.done("jobs/export.py", "--run", f"{place.runs}/first", "--to", artifact)
    assert output.splitlines()[-1] == f"{artifact}: the weights of step {STEPS}"
    return artifact


@pytest.mark.soak
def test_the_exported_run_answers_right(artifact: str, place: Place, tmp_path: Path) -> None:
    stages = Stages(ROOT / "jobs", place.cluster.shell.environment())
    with served(stages, locate(artifact), tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, timeout=30)
        for name, shade in COLOURS.items():
            picture = io.BytesIO()
            Image.new("RGB", (48, 48), shade).save(picture, "PNG")
            data = base64.b64encode(picture.getvalue()).decode()
            content = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
                {"type": "text", "text": QUESTION},
            ]
            reply = client.chat.completions.create(
                model=server.model, messages=[{"role": "user", "content": content}], temperature=0
            )
            assert reply.choices[0].message.content == name


@pytest.mark.soak
def test_an_artifact_is_fine_tuned_and_evaluated(artifact: str, submitted: str, place: Place, tmp_path: Path) -> None:
    shell = place.cluster.shell
    settings = ["--recipe", "demo-lora", "--model.init-from", artifact, *SMALL[2:], "--steps", 4]
    places = ["--data.dataset", place.dataset, "--runs", place.runs, "--name", "tuned"]
    output = shell.done("jobs/finetune.py", *settings, *places, "--log-every", 1)
    found = dict(re.findall(r"step (\d)/4 +loss (\S+)", output))
    assert list(found) == ["1", "2", "3", "4"]
    assert float(found["1"]) < 0.5 * float(losses(submitted)[1])  # it starts from what was learned

    words = ["--run", f"{place.runs}/tuned", "--to", tmp_path / "adapter", "--form", "adapter"]
    assert shell.done("jobs/export.py", *words).splitlines()[-1] == f"{tmp_path}/adapter: the adapter of step 4"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()

    words = ["--artifact", artifact, "--dataset", place.dataset, "--out", tmp_path / "evaluation", "--actors.count", 2]
    output = shell.done("jobs/evaluate.py", *words, "--generation.max-tokens", 8)
    assert f"answers: {PICTURES}/{PICTURES}" in output
    scores = json.loads((tmp_path / "evaluation" / "report.json").read_text())["scores"]
    row = [scores["samples"], scores["left_out"], f"{scores['exact_match']:.1%}", f"{scores['cider_d']:.3f}"]
    assert [str(cell) for cell in [*row, f"{scores['loss']:.4f}"]] == re.findall(r"[\d.]+%?", output.splitlines()[-3])
    assert scores["samples"] == PICTURES
    assert scores["exact_match"] == 1.0
    answers = [json.loads(line) for line in (tmp_path / "evaluation" / "answers.jsonl").read_text().splitlines()]
    assert all(one["answer"] == one["expected"] for one in answers)


@pytest.mark.soak
def test_a_submitted_release_brings_its_code_along(submitted: str, place: Place, tmp_path: Path) -> None:
    """Also where the nodes of the replicas have none: what Serve is told to run is the job's upload."""
    port, dashboard = free_port(), place.cluster.dashboard
    application = {"name": "colours", "import_path": "serve.app:build"}
    config = {"http_options": {"port": port}, "proxy_location": "HeadOnly"}
    config |= {"applications": [application | {"args": {"name": "colours", "auth": "off", "cpus": 0.5}}]}
    (tmp_path / "serve.yaml").write_text(json.dumps(config))
    words = ["--run", f"{place.runs}/first", "--to", f"{place.cluster.bucket}/releases", "--heldout", place.dataset]
    words += ["--bar.exact-match", "1", "--canary.max-tokens", "8", "--canary.questions", "12"]
    words += ["--service.config", str(tmp_path / "serve.yaml"), "--service.address", dashboard]
    job = place.cluster.submit("python", "jobs/release.py", "ship", *words)
    assert job.returncode == 0, job.stdout + job.stderr
    name = f"colours-first-step-{STEPS:08d}"
    assert f"live: {name}" in job.stdout
    serving = {"url": f"{dashboard}/api/serve/applications/", "timeout": 60}
    serving |= {"headers": {"Authorization": f"Bearer {place.cluster.shell.variables['RAY_AUTH_TOKEN']}"}}
    deployed = httpx.get(**serving).json()["applications"][name]["deployed_app_config"]
    assert deployed["runtime_env"]["working_dir"].startswith("gcs://")
    assert deployed["args"]["checkpoint"] == f"{place.cluster.bucket}/releases/{name}/artifact"
    for shade, colour in COLOURS.items():
        picture = io.BytesIO()
        Image.new("RGB", (48, 48), colour).save(picture, "PNG")
        question = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        server = Server(f"http://127.0.0.1:{port}", "", "colours")
        (reply,) = ask(server, [Chat([{"role": "user", "content": question}], [picture.getvalue()])], 8)
        assert reply.text == shade
    assert httpx.delete(**serving).is_success
