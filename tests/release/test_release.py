"""Releases on a real cluster: the first, one below the bar, one that the canary refuses, a switch under load, back."""

import json
import secrets
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import pytest

from mqwen.data.sample import Sample
from mqwen.model.chat import text_of
from mqwen.release.client import Chat, Reply, Server, ask
from serve.keys import ENVIRONMENT, hash_key
from tests.end_to_end.commands import ROOT, Shell, read_until, shell
from tests.end_to_end.nodes import BIN, free_port, wait
from tests.release.making import MAX_TOKENS, QUESTIONS, make_all

pytestmark = pytest.mark.soak  # minutes; `make test` has one release, in tests/end_to_end/test_commands.py
KEY = "sk-release"
FIRST, SECOND = "ours-first-step-00000001", "ours-first-step-00000002"


@dataclass
class Place:
    """A cluster of one node, a run with two checkpoints, questions that the first of them answers right."""

    shell: Shell
    folder: Path
    samples: list[Sample]
    second: list[str]  # what the other checkpoint answers to them
    dashboard: str
    server: Server

    def release(self, *words: object) -> tuple[int, str]:
        """`jobs/release.py`: exit code and output."""
        where = ["--service.config", self.folder / "serve.yaml", "--service.address", self.dashboard]
        return self.shell.run("jobs/release.py", *words, *where)

    def ship(self, *words: object) -> tuple[int, str]:
        places = ["--run", self.folder / "runs" / "first", "--to", self.folder / "to", "--heldout"]
        return self.release("ship", *places, self.folder / "heldout", "--canary.max-tokens", MAX_TOKENS, *words)

    @contextmanager
    def asking(self, name: str, value: str) -> Iterator[None]:
        """Another environment variable for the commands in the block."""
        before = self.shell.variables
        self.shell.variables = before | {name: value}
        try:
            yield
        finally:
            self.shell.variables = before

    def details(self) -> dict[str, Any]:
        asking = {"Authorization": f"Bearer {self.shell.variables['RAY_AUTH_TOKEN']}"}
        reply = httpx.get(f"{self.dashboard}/api/serve/applications/", headers=asking, timeout=30)
        return reply.json()["applications"]

    def applications(self) -> dict[str, tuple[str, str]]:
        """Route and status of each application, by name."""
        return {name: (one["route_prefix"], one["status"]) for name, one in self.details().items()}

    def replicas(self) -> set[int]:
        """Process ids of what holds a model."""
        return {one.pid for one in self.shell.processes() if "ModelReplica" in " ".join(one.cmdline())}

    @property
    def same(self) -> int:
        """How many questions both checkpoints answer alike."""
        pairs = zip(self.samples, self.second, strict=True)
        return sum(text_of(sample.messages[-1]).strip() == other.strip() for sample, other in pairs)

    def right(self) -> int:
        """How many questions are answered right at the clients' route."""
        replies = ask(self.server, [chat(sample) for sample in self.samples], MAX_TOKENS)
        assert not [reply.error for reply in replies if reply.error]
        return sum(is_right(reply, sample) for reply, sample in zip(replies, self.samples, strict=True))


def chat(sample: Sample) -> Chat:
    return Chat(sample.messages[:-1], sample.pictures)


def is_right(reply: Reply, sample: Sample) -> bool:
    return reply.text.strip() == text_of(sample.messages[-1]).strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("release")
    with ProcessPoolExecutor(1, get_context("spawn")) as process, shell() as found:
        making = process.submit(make_all, folder)
        port, dashboard, http = free_port(), free_port(), free_port()
        found.variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "MQWEN_API_KEY": KEY}
        words = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}"]
        words += ["--num-cpus=4", "--disable-usage-stats", "--block"]
        with (found.ray_folder / "log").open("w") as log:
            subprocess.Popen(
                [BIN / "ray", "start", *words],
                cwd=ROOT,
                env=found.environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        asking = {"Authorization": f"Bearer {found.variables['RAY_AUTH_TOKEN']}"}
        wait(lambda: httpx.get(f"http://127.0.0.1:{dashboard}/api/version", headers=asking).is_success)
        found.variables["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        application: dict[str, Any] = {"name": "ours", "import_path": "serve.app:build"}
        application["args"] = {"name": "ours", "cpus": 0.5, "min_replicas": 2, "max_replicas": 2}
        application["runtime_env"] = {"env_vars": {ENVIRONMENT: hash_key(KEY)}}
        config = {"http_options": {"port": http}, "applications": [application]}
        (folder / "serve.yaml").write_text(json.dumps(config))  # JSON is YAML
        server = Server(f"http://127.0.0.1:{http}", KEY, "ours")
        samples, second = making.result()
        yield Place(found, folder, samples, second, f"http://127.0.0.1:{dashboard}", server)


@dataclass
class Load:
    """What clients got meanwhile, in its order: whether each answer was right, by the first checkpoint's standard."""

    right: list[bool] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@contextmanager
def under_load(place: Place) -> Iterator[Load]:
    """Asks one question that the two checkpoints answer differently, again and again, as long as the block runs."""
    load, ended = Load(), threading.Event()
    pairs = zip(place.samples, place.second, strict=True)
    sample = next(sample for sample, other in pairs if text_of(sample.messages[-1]).strip() != other.strip())

    def run() -> None:
        while not ended.is_set():
            (reply,) = ask(place.server, [chat(sample)], MAX_TOKENS)
            load.errors += [reply.error] if reply.error else []
            load.right.append(is_right(reply, sample))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield load
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def released(place: Place) -> str:
    """What the first release prints."""
    code, output = place.ship("--bar.exact-match", 1.0, "--step", 1)
    assert code == 0, output
    return output


def test_the_first_release_is_live(place: Place, released: str) -> None:
    assert released.splitlines()[-1] == f"live: {FIRST}"
    assert place.applications() == {FIRST: ("/", "RUNNING")}
    assert place.right() == QUESTIONS
    assert httpx.get(f"{place.server.url}/v1/models").status_code == 401
    report = json.loads((place.folder / "to" / FIRST / "evaluation" / "report.json").read_text())
    assert report["scores"]["exact_match"] == 1.0


def test_a_checkpoint_that_is_live_or_below_the_bar_is_not_deployed(place: Place, released: str) -> None:
    code, output = place.ship("--bar.exact-match", 1.0, "--step", 1)
    assert code == 2, output
    assert f"artifact is live already (application '{FIRST}')" in output
    assert place.same < QUESTIONS
    code, output = place.ship("--bar.exact-match", 1.0, "--step", 2)
    assert code == 2, output
    assert f"below the bar, so nothing was deployed: exact_match is {place.same / QUESTIONS:.4f}" in output
    with place.asking("MQWEN_API_KEY", "sk-another"):
        code, output = place.ship("--bar.exact-match", 1.0, "--step", 2)
    assert (code, "exported" in output) == (2, False), output
    assert f"MQWEN_API_KEY is no key of the live model at {place.server.url}" in output
    code, output = place.release("roll-back")
    assert (code, output.splitlines()[-1]) == (
        2,
        "error: no second application of 'ours' stands by, so there is nothing to go back to",
    )
    assert place.applications() == {FIRST: ("/", "RUNNING")}


def test_bad_input_is_one_line_before_anything_is_computed(place: Place, released: str, tmp_path: Path) -> None:
    run, heldout = place.folder / "runs" / "first", place.folder / "heldout"
    for words, message in (
        (["--run", tmp_path / "none", "--heldout", heldout], f"{tmp_path}/none has no committed checkpoint"),
        (
            ["--run", run, "--heldout", heldout, "--step", 9],
            f"{run} has no checkpoint of step 9; there are step-00000001",
        ),
        (["--run", run, "--heldout", tmp_path / "none"], f"{tmp_path}/none"),
        (["--run", run, "--heldout", heldout, "--bar.exact-match", 2], "--bar.exact-match is 2.0; 0 to 1 is allowed"),
        (["--run", run, "--heldout", heldout, "--to", run], f"lies inside of the run {run}"),
    ):
        code, output = place.release("ship", "--to", tmp_path / "to", "--bar.loss", 1e9, *words)
        assert (code, output.count("error: "), "Traceback" in output) == (2, 1, False), output
        assert message in output
    assert not (tmp_path / "to").exists()
    with place.asking("RAY_AUTH_TOKEN", secrets.token_hex(32)):
        code, output = place.release("roll-back")
    assert (code, "Traceback" in output) == (2, False), output
    assert f"error: --service.address {place.dashboard}: the Ray dashboard there says no: " in output
    assert place.applications() == {FIRST: ("/", "RUNNING")}


def test_a_candidate_that_does_not_start_leaves_the_live_one(place: Place, released: str) -> None:
    file = place.folder / "serve.yaml"
    good = file.read_text()
    for old, new, limit, message in (
        ('"cpus"', '"cpsu"', 100, "Unknown option cpsu=0.5; did you mean cpus?"),
        ("0.5", "64", 8, f"application '{SECOND}' is not running after 8 s: "),
    ):
        file.write_text(good.replace(old, new))
        code, output = place.ship("--bar.loss", 1e9, "--service.start-limit", limit)
        file.write_text(good)
        assert code == 2, output
        assert message in output
    wait(lambda: place.applications() == {FIRST: ("/", "RUNNING")})
    assert place.right() == QUESTIONS


def test_an_interrupted_release_ends_its_candidate(place: Place, released: str) -> None:
    words = ["--run", place.folder / "runs" / "first", "--to", place.folder / "to", "--bar.loss", 1e9, "--heldout"]
    words += [place.folder / "heldout", "--service.config", place.folder / "serve.yaml"]
    words += ["--service.address", place.dashboard]
    with place.shell.start("jobs/release.py", "ship", *words) as process:
        read_until(process, "above the bar")
        wait(lambda: SECOND in place.applications())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    wait(lambda: place.applications() == {FIRST: ("/", "RUNNING")})


def test_what_the_canary_refuses_goes_and_the_live_one_stays(place: Place, released: str) -> None:
    before = place.replicas()
    with under_load(place) as load:
        other = ["--canary-set", place.folder / "heldout", "--canary.seed", 1, "--service.url", place.server.url]
        code, output = place.ship("--bar.loss", 1e9, *other)
    assert code == 2, output
    said = f"of {QUESTIONS} canary questions the candidate answers {place.same} right, the live model {QUESTIONS}"
    assert said in output
    assert "Traceback" not in output
    wait(lambda: place.applications() == {FIRST: ("/", "RUNNING")})
    assert place.replicas() >= before
    assert not load.errors
    assert all(load.right)


def test_a_switch_and_the_way_back_lose_no_request_and_restart_no_replica(place: Place, released: str) -> None:
    before = place.replicas()
    file = place.folder / "serve.yaml"
    file.write_text(file.read_text().replace('"min_replicas": 2', '"min_replicas": 1'))
    with under_load(place) as load:
        code, output = place.ship("--bar.loss", 1e9, "--canary.allowed-drop", 1)
    assert code == 0, output
    # As many as the live one had, not as few as it may shrink to.
    assert len(place.details()[SECOND]["deployments"]["ModelReplica"]["replicas"]) == 2
    assert output.splitlines()[-1] == f"live: {SECOND}; standing by: {FIRST}"
    assert place.applications() == {SECOND: ("/", "RUNNING"), FIRST: (f"/{FIRST}", "RUNNING")}
    both = place.replicas()
    assert before < both
    assert not load.errors
    assert load.right == sorted(load.right, reverse=True)  # the old one's answers, then the new one's
    assert set(load.right) == {True, False}
    assert place.right() == place.same
    lines = (place.folder / "to" / SECOND / "canary.jsonl").read_text().splitlines()
    found = [(one["expected"], one["live"]["text"], one["candidate"]["text"]) for one in map(json.loads, lines)]
    expected = [(text_of(s.messages[-1]),) * 2 + (other,) for s, other in zip(place.samples, place.second, strict=True)]
    assert sorted(found) == sorted(expected)

    with under_load(place) as load:
        code, output = place.release("roll-back")
    assert (code, output.splitlines()[-1]) == (0, f"live: {FIRST}; standing by: {SECOND}")
    assert not load.errors
    assert load.right == sorted(load.right)
    assert place.right() == QUESTIONS
    assert place.replicas() == both
