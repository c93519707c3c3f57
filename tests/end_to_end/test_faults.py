"""Runs that lose a node, hang, change their number of workers: they go on by themselves and compute the same."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mqwen.storage import locate
from mqwen.train import spares, watchdog
from mqwen.train.records import read_metrics
from tests.end_to_end.commands import read_until
from tests.end_to_end.nodes import Cluster, cluster, lose
from tests.end_to_end.place import STEPS, Place, make_place
from tests.faulty import Faulty

pytestmark = pytest.mark.soak

SAVED = r"step (1|2)\d: checkpoint"


@pytest.fixture(scope="module")
def s3(moto: str) -> Iterator[Faulty]:
    with Faulty(moto).serving() as server:
        yield server


@pytest.fixture(scope="module")
def nodes(s3: Faulty) -> Iterator[Cluster]:
    with cluster(s3.url) as found:
        yield found


@pytest.fixture(scope="module")
def place(nodes: Cluster, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(nodes, tokenizer, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> list[dict[str, Any]]:
    """What three workers' metrics are."""
    place.cluster.shell.done(*place.options("undisturbed", "--parallel.workers", 3))
    return metrics(place, "undisturbed")


def metrics(place: Place, name: str) -> list[dict[str, Any]]:
    return read_metrics(locate(place.runs) / name)


def assert_same_steps(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    """Each step trained on the same samples, to the same loss."""
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for name in ("place", "tokens", "positions", "images"):
        assert [record[name] for record in found] == [record[name] for record in expected]
    expected_losses = [record["loss"] for record in expected]
    assert [record["loss"] for record in found] == pytest.approx(expected_losses, rel=tolerance)


def rest_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.wait(60) == 0, output
    return output


def workers_of(place: Place, *more: str) -> list[psutil.Process]:
    names = ("TrainWorker", *more)
    return [one for one in place.cluster.shell.processes() if any(name in " ".join(one.cmdline()) for name in names)]


def test_a_run_that_loses_a_node_goes_on_when_another_comes(place: Place, undisturbed: list[dict[str, Any]]) -> None:
    with place.cluster.shell.start(*place.options("node-lost", "--parallel.workers", 3)) as process:
        read_until(process, SAVED)
        lose(place.cluster.second)
        place.cluster.second = place.cluster.add_node()
        output = rest_of(process)
    assert re.search(r"resumed from \S+ with 3 workers", output)
    assert_same_steps(metrics(place, "node-lost"), undisturbed, 1e-5)


def test_who_takes_a_killed_workers_place_was_ready(place: Place) -> None:
    """Once the run has gone on for a while, the processes of the next group wait with everything imported."""
    with place.cluster.shell.start(*place.options("spares", "--parallel.workers", 2, "--steps", 10_000)) as process:
        read_until(process, r"step \d+/")
        ready = time.monotonic() + spares.AFTER + 10 * spares.PAUSE
        while time.monotonic() < ready:
            read_until(process, r"step \d+: checkpoint")
        killed = time.time()
        workers_of(place)[-1].kill()
        read_until(process, r"resumed from \S+ with 2 workers")
        read_until(process, r"step \d+/")
        known = workers_of(place, *spares.OWN, "ReadWindows")
        assert len(known) >= 2 + len(spares.OWN)
        assert [one for one in known if one.create_time() > killed] == []
        process.terminate()


def test_an_elastic_run_goes_on_with_fewer_and_takes_more(place: Place, undisturbed: list[dict[str, Any]]) -> None:
    """Three workers, one or two when a node is lost, three again a minute after it is back."""
    slow = ["--parallel.workers", 3, "--parallel.min-workers", 1, "--checkpoint.every", 1]
    with place.cluster.shell.start(*place.options("elastic", *slow)) as process:
        read_until(process, SAVED)
        lose(place.cluster.second)
        fewer = read_until(process, r"resumed from \S+ with (1|2) workers")
        place.cluster.second = place.cluster.add_node()
        output = fewer + rest_of(process)
    print(re.findall(r"resumed from \S+step-(\d+) with (\d) workers", output))
    assert_same_steps(metrics(place, "elastic"), undisturbed, 1e-3)


def test_two_three_and_one_workers(place: Place, undisturbed: list[dict[str, Any]]) -> None:
    """A run started again with other numbers of workers."""
    for workers in (2, 3):
        with place.cluster.shell.start(*place.options("numbers", "--parallel.workers", workers)) as process:
            read_until(process, r"step \d+/")
            read_until(process, r"step \d+: checkpoint")
            os.killpg(process.pid, signal.SIGKILL)
    output = place.cluster.shell.done(*place.options("numbers", "--parallel.workers", 1))
    assert re.search(r"resumed from \S+ with 1 workers", output)
    assert_same_steps(metrics(place, "numbers"), undisturbed, 1e-3)


def test_a_worker_that_hangs_ends_with_its_stacks_and_the_run_goes_on(
    place: Place, undisturbed: list[dict[str, Any]]
) -> None:
    options = place.options("hanging", "--parallel.workers", 3, "--parallel.hang-timeout", 20)
    with place.cluster.shell.start(*options) as process:
        read_until(process, SAVED)
        stopped = workers_of(place)[-1]
        stopped.suspend()
        started = time.monotonic()
        said = read_until(process, "has not ended a pass for 20 s")
        assert time.monotonic() - started < 40
        output = said + rest_of(process)
    assert re.search(r"resumed from \S+ with 3 workers", output)
    assert not stopped.is_running()
    stacks = locate(place.runs) / "hanging" / watchdog.FOLDER
    assert len(stacks.names()) == 2  # of all but the one that could not
    for name in stacks.names():
        assert "in train\n" in (stacks / name).read_bytes().decode()
    assert_same_steps(metrics(place, "hanging"), undisturbed, 1e-5)


def test_storage_away_for_a_minute(place: Place, undisturbed: list[dict[str, Any]], s3: Faulty) -> None:
    with place.cluster.shell.start(*place.options("away", "--parallel.workers", 3)) as process:
        read_until(process, SAVED)
        s3.down = True
        back = threading.Timer(60, lambda: setattr(s3, "down", False))
        back.start()
        output = rest_of(process)
        back.join()
    assert "; trying again in 1 s" in output
    assert "resumed from" not in output
    assert_same_steps(metrics(place, "away"), undisturbed, 1e-5)


def test_storage_that_refuses_every_third_request(
    place: Place, undisturbed: list[dict[str, Any]], s3: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "refuse_every", 3)
    before = s3.refused
    output = place.cluster.shell.done(*place.options("refused", "--parallel.workers", 3))
    assert "resumed from" not in output
    assert s3.refused > before + 10
    assert_same_steps(metrics(place, "refused"), undisturbed, 1e-5)


def test_a_node_that_will_be_taken_away_gets_a_checkpoint_before(place: Place) -> None:
    """None is due for a long time."""
    shell, steps = place.cluster.shell, 600
    options = place.options("preempted", "--parallel.workers", 3, "--steps", steps, "--checkpoint.every", 10 * steps)
    with shell.start(*options) as process:
        read_until(process, r"step 10/")
        drain(place)
        saved = re.search(r"step (\d+): checkpoint", read_until(process, r"step \d+: checkpoint"))
        assert saved is not None
        lose(place.cluster.second)
        place.cluster.second = place.cluster.add_node()
        resumed = read_until(process, r"resumed from \S+ with 3 workers")
        assert f"step-{int(saved[1]):08d}" in resumed
        process.terminate()


def drain(place: Place) -> None:
    """Announces the end of the second node, as a cloud's notice does."""
    shell = place.cluster.shell
    known = "import ray; ray.init(logging_level='ERROR'); print(*[n['NodeID'] for n in ray.nodes() if n['Alive'] and "
    known += "'node:__internal_head__' not in n['Resources']])"
    node = shell.done("-c", known).split()[-1]
    words = ["drain-node", "--address", shell.variables["RAY_ADDRESS"], "--node-id", node]
    words += [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
        "--deadline-remaining-seconds",
        60,
    ]
    shell.done("-m", "ray.scripts.scripts", *words)
