"""A cluster of three nodes that trains and serves loses a node, and then its head, which keeps its state in RocksDB.

The head takes no work, as in infra/kuberay; the job's driver is on a node too.
"""

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from serve.keys import ENVIRONMENT, hash_key
from tests.end_to_end.commands import ROOT
from tests.end_to_end.nodes import BIN, Cluster, cluster, free_port, lose, wait
from tests.end_to_end.place import Place, make_place
from tests.engine.tiny import build_artifact
from tests.serve.clients import PATH, chat
from tests.serve.running import KEY

AWAY = 15.0  # seconds without a head
PAUSE = 0.2  # seconds between requests
LIMIT = 240.0  # seconds that anything may take


class Figures(dict[str, Any]):
    """By what they are; each is printed when it is known."""

    def __setitem__(self, what: str, value: Any) -> None:
        super().__setitem__(what, round(value, 1) if isinstance(value, float) else value)
        print(f"{what}: {self[what]}", flush=True)


@dataclass
class Client:
    """Asks again and again, each time on a new connection. `answers` are when each came, and whether it was one."""

    url: str
    answers: list[tuple[float, bool]] = field(default_factory=list)

    def ask(self) -> bool:
        headers = {"Authorization": f"Bearer {KEY}"}
        try:
            return httpx.post(f"{self.url}{PATH}", json=chat(0, 4), headers=headers, timeout=10).is_success
        except httpx.HTTPError:
            return False

    @contextmanager
    def asking(self) -> Iterator[None]:
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(PAUSE):
                good = self.ask()
                self.answers.append((time.monotonic(), good))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def tell(self, when: str, moment: float, found: Figures) -> None:
        """What came since that moment."""
        good = [at for at, ok in self.answers if ok and at > moment]
        found[f"{when}: answers"] = len(good)
        found[f"{when}: requests failed"] = sum(not ok for at, ok in self.answers if at > moment)
        gaps = [later - earlier for earlier, later in pairwise([moment, *good, time.monotonic()])]
        found[f"{when}: longest time without an answer, s"] = max(gaps)


@dataclass
class Job:
    """The training, as its driver's log tells of it."""

    place: Place
    name: str

    def submit(self, number: int) -> None:
        options = "--no-wait", "--entrypoint-num-cpus", "0.1", "--submission-id", f"{self.name}-{number}"
        # Three are more than one node has room for.
        words = self.place.options(self.name, "--steps", 100_000, "--parallel.workers", 3)
        done = self.place.cluster.submit("python", *words, options=options)
        assert done.returncode == 0, done.stdout + done.stderr

    def said(self) -> str:
        logs = (self.place.cluster.shell.ray_folder / "ray" / "session_latest" / "logs").glob("job-driver-*.log")
        return "".join(log.read_text() for log in sorted(logs, key=lambda log: log.stat().st_mtime))

    def steps(self) -> list[int]:
        return [int(step) for step in re.findall(r"step (\d+)/", self.said())]

    def wait_until(self, pattern: str, after: int = 0) -> float:
        """Seconds until a text is in what it said after so many characters."""
        return until(lambda: re.search(pattern, self.said()[after:]) is not None, self.said)


def until(condition: Callable[[], bool], told: Callable[[], Any]) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < LIMIT, told()
        time.sleep(0.1)
    return time.monotonic() - began


def driver(nodes: Cluster) -> psutil.Process | None:
    """The job's, on whichever node it is."""
    for process in nodes.shell.processes():
        try:
            if "jobs/pretrain.py" in process.cmdline():
                return process
        except psutil.Error:
            pass
    return None


@contextmanager
def serving(nodes: Cluster, folder: Path) -> Iterator[Client]:
    """A model of two replicas, one on each node."""
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    (application,), port = config["applications"], free_port()
    config["http_options"]["port"] = port
    options = {"cpus": 0.25, "min_replicas": 2, "max_replicas": 2, "ingress_replicas": 2}
    application["args"] |= {"name": "tiny", "checkpoint": str(build_artifact(folder / "tiny")), **options}
    application["runtime_env"]["env_vars"] = {ENVIRONMENT: hash_key(KEY)}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    deploy = [BIN / "serve", "deploy", folder / "serve.yaml", "--address", nodes.dashboard]
    subprocess.run(deploy, cwd=ROOT, env=nodes.shell.environment(), check=True)
    client = Client(f"http://127.0.0.1:{port}")
    wait(client.ask, LIMIT)
    until(lambda: running(nodes) == 4, lambda: running(nodes))
    with client.asking():
        yield client


def running(nodes: Cluster) -> int:
    """Replicas of model and ingress that Serve's controller has running; 0 where nobody answers."""
    headers = {"Authorization": f"Bearer {nodes.shell.variables['RAY_AUTH_TOKEN']}"}
    try:
        answer = httpx.get(f"{nodes.dashboard}/api/serve/applications/", headers=headers, timeout=10)
    except httpx.HTTPError:
        return 0
    if not answer.is_success:
        return 0
    deployments = [d for one in answer.json()["applications"].values() for d in one["deployments"].values()]
    return sum(replica["state"] == "RUNNING" for one in deployments for replica in one["replicas"])


def lose_all(s3: str, tokenizer: Path, folder: Path) -> Figures:
    """`s3` is the URL of a server with the bucket `bucket`."""
    # As KubeRay sets them.
    stored = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder / "gcs")}
    stored |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
    path = {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    found = Figures()
    with cluster(s3, head_cpus=0, node_cpus=3, **stored, **path) as nodes:
        third = nodes.add_node()
        job = Job(make_place(nodes, tokenizer, folder), "lost")
        with serving(nodes, folder) as client:
            job.submit(1)
            job.wait_until(r"step \d+: checkpoint")
            lose_node(nodes, third, job, client, found)
            lose_head(nodes, job, client, found)
    return found


def lose_node(nodes: Cluster, third: subprocess.Popen, job: Job, client: Client, found: Figures) -> None:
    """One of the two that work: that without the driver. Another comes at once."""
    at_work = driver(nodes)
    assert at_work is not None
    above = {process.pid for process in at_work.parents()}
    before, lost = len(job.said()), time.monotonic()
    lose(third if nodes.second.pid in above else nodes.second)
    nodes.add_node()
    found["node lost: another is there after, s"] = time.monotonic() - lost
    until(lambda: running(nodes) == 4, lambda: running(nodes))
    found["node lost: all replicas run after, s"] = time.monotonic() - lost
    job.wait_until(r"resumed from \S+ with 3 workers[\s\S]*step \d+/", before)
    found["node lost: training steps again after, s"] = time.monotonic() - lost
    client.tell("node lost", lost, found)


def lose_head(nodes: Cluster, job: Job, client: Client, found: Figures) -> None:
    """It is away for AWAY seconds and the time that another takes to start."""
    last, lost = job.steps()[-1], time.monotonic()
    lose(nodes.head)
    time.sleep(AWAY)
    client.tell("head away", lost, found)
    found["head away: steps trained"] = job.steps()[-1] - last
    nodes.head = nodes.add_head()
    found["head lost: another is there after, s"] = time.monotonic() - lost
    until(lambda: running(nodes) == 4, lambda: running(nodes))
    found["head lost: Serve knows its replicas after, s"] = time.monotonic() - lost
    survived = driver(nodes) is not None
    found["head lost: the job lived on"] = survived
    if not survived:
        job.submit(2)
    reached = job.steps()[-1]
    until(lambda: job.steps()[-1] > reached + 5, job.said)
    found["head lost: training steps again after, s"] = time.monotonic() - lost
    client.tell("head lost", lost, found)
