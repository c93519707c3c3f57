"""Checkpoints are written beside the training, whatever the storage does meanwhile."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist

from mqwen.storage import Location, locate
from mqwen.train import checkpoint, saver
from mqwen.train.checkpoint import CheckpointError
from mqwen.train.loop import Progress
from mqwen.train.saver import Saver
from mqwen.train.settings import CheckpointSettings, RunSettings
from tests.conftest import KEYS, set_all
from tests.faulty import Faulty
from tests.train.conftest import Ranks
from tests.train.making import fresh_strategy, other_seed
from tests.train.test_checkpoint import assert_same, flat

LONG = 30  # seconds that a test waits for a file


@pytest.fixture
def s3(moto: str, no_aws: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    with Faulty(moto).serving() as server:
        set_all(monkeypatch, AWS_ENDPOINT_URL=server.url, **KEYS)
        yield server


@pytest.fixture
def on_s3(settings: RunSettings, tmp_path: Path) -> RunSettings:
    return replace(settings, runs=f"s3://bucket/{tmp_path.name}")


def wait_for(file: Path) -> None:
    limit = time.monotonic() + LONG
    while not file.exists():
        assert time.monotonic() < limit, f"{file} does not come"
        time.sleep(0.01)


def save_and_go_on(
    rank: int, workers: int, settings: RunSettings, endpoint: str, signs: Path
) -> tuple[dict, list[bool], dict, str]:
    """Begins a checkpoint and changes the weights after it. The state as it was; whether it was being written then and
    at the end; what another strategy loads; what was printed."""
    os.environ.update(KEYS, AWS_ENDPOINT_URL=endpoint)
    strategy, run = fresh_strategy(settings), locate(settings.runs) / settings.name
    saver, busy = Saver(run, settings), []
    was = flat(strategy.state())
    with redirect_stdout(StringIO()) as printed:
        saver.save(strategy.state(), Progress(3, (0, 0, 4)), 1.5, {"beside.txt": b"there"})
        for parameter in strategy.model.parameters():
            parameter.data.zero_()
        busy.append(saver.busy())
        (signs / f"going-on-{rank}").touch()
        saver.wait()
        busy.append(saver.busy())
    other = fresh_strategy(other_seed(settings))
    state = other.state()
    assert checkpoint.resume(run, state) == Progress(3, (0, 0, 4))
    return was, busy, flat(state), printed.getvalue()


def test_training_goes_on_while_storage_is_mute(ranks: Ranks, on_s3: RunSettings, s3: Faulty, tmp_path: Path) -> None:
    """What is written is the state as it was."""
    run = locate(on_s3.runs) / on_s3.name

    def end_when_both_go_on() -> None:
        with s3.mute():
            for rank in range(2):
                wait_for(tmp_path / f"going-on-{rank}")

    ending = threading.Thread(target=end_when_both_go_on)
    ending.start()
    for was, busy, loaded, _ in ranks.run(2, save_and_go_on, on_s3, s3.url, tmp_path):
        assert busy == [True, False]
        assert_same(loaded, was)
    ending.join()
    (saved,) = checkpoint.committed(run)
    assert checkpoint.read_commit(saved).loss == 1.5
    assert (run / "beside.txt").read_bytes() == b"there"


def save_twice(rank: int, workers: int, settings: RunSettings) -> list[set[float]]:
    """What checkpoints hold whose state is their step's number, and changes as soon as it may. On a GPU if there is
    one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {name: torch.zeros(size, device=device) for name, size in (("large", 1 << 24), ("small", 3))}
    run, state = locate(settings.runs) / settings.name, {"model": weights}
    saver = Saver(run, settings)
    saver.make_room(state)
    for step in (1, 2):
        saver.wait()
        for weight in weights.values():
            weight.fill_(step)
        saver.save(state, Progress(step, (0, 0, step)))
        saver.wait_for_copy()
        for weight in weights.values():
            weight.fill_(-1)
    saver.wait()
    found = []
    for saved in checkpoint.committed(run):
        loaded = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
        checkpoint.load(saved, {"model": loaded})
        found.append({value for weight in loaded.values() for value in weight.unique().tolist()})
    return found


def test_a_checkpoint_is_the_state_before_it_changed(ranks: Ranks, settings: RunSettings) -> None:
    assert ranks.run(1, save_twice, settings) == [[{1.0}, {2.0}]]


@pytest.mark.soak
def test_a_third_of_all_requests_may_fail(ranks: Ranks, on_s3: RunSettings, s3: Faulty, tmp_path: Path) -> None:
    s3.refuse_every = 3
    for was, _, loaded, _ in ranks.run(2, save_and_go_on, on_s3, s3.url, tmp_path):
        assert_same(loaded, was)
    assert s3.refused > 3


@pytest.mark.soak
def test_storage_may_be_away_for_a_minute(ranks: Ranks, on_s3: RunSettings, s3: Faulty, tmp_path: Path) -> None:
    s3.down = True
    back = threading.Timer(60, lambda: setattr(s3, "down", False))
    back.start()
    answers = ranks.run(2, save_and_go_on, on_s3, s3.url, tmp_path)
    for was, busy, loaded, _ in answers:
        assert busy == [True, False]
        assert_same(loaded, was)
    assert "cannot be deleted" in answers[0][3] or "cannot be read" in answers[0][3]
    assert "; trying again in 1 s" in answers[0][3]
    back.join()


def save_to_nobody(rank: int, workers: int, settings: RunSettings) -> tuple[str, float]:
    os.environ.update(KEYS, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    strategy = fresh_strategy(settings)
    saver, started = Saver(locate(settings.runs) / settings.name, settings), time.monotonic()
    saver.save(strategy.state(), Progress(3, (0, 0, 4)))
    begun = time.monotonic() - started
    try:
        saver.wait()
    except CheckpointError as error:
        return str(error), begun
    raise AssertionError("it was written")


@pytest.mark.soak
def test_storage_that_stays_away_ends_the_run_on_every_rank(ranks: Ranks, on_s3: RunSettings) -> None:
    settings = replace(on_s3, checkpoint=CheckpointSettings(patience=1))
    for said, begun in ranks.run(2, save_to_nobody, settings):
        assert "a checkpoint could not be written: s3://bucket/" in said
        assert "tried for --checkpoint.patience 1 seconds" in said
        assert begun < 5


def save_in_folders_of_their_own(rank: int, workers: int, settings: RunSettings) -> str:
    """Each rank's folder is another one under the same name, as on nodes that share none."""
    strategy, here = fresh_strategy(settings), Path(settings.runs) / f"node-{rank}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "SEEN", 0.0)
        patch.setattr(saver, "step_folder", lambda run, step: Location(run.filesystem, f"{here}/{step}", f"/{step}"))
        mine = Saver(locate(settings.runs) / settings.name, settings)
        mine.save(strategy.state(), Progress(3, (0, 0, 4)))
        with pytest.raises(CheckpointError) as raised:
            mine.wait()
    assert rank or not (here / "3" / checkpoint.COMMIT).exists()
    return str(raised.value)


def test_without_a_shared_folder_nothing_is_committed(ranks: Ranks, settings: RunSettings) -> None:
    for said in ranks.run(2, save_in_folders_of_their_own, settings):
        assert "/3/__1_0.distcp is not there, or not whole" in said
        assert "--runs must be a folder that all nodes share, or s3://" in said


def save_until_killed(folder: Path, settings: RunSettings, endpoint: str, begun: Connection) -> None:
    """Checkpoints whose weights are all their step's number, one after the other."""
    os.environ.update(KEYS, AWS_ENDPOINT_URL=endpoint)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    strategy, run = fresh_strategy(settings), locate(settings.runs) / settings.name
    saver = Saver(run, settings)
    for step in range(checkpoint.progress(run).step + 1, 10**6):
        for parameter in strategy.model.parameters():
            parameter.data.fill_(step)
        begun.send(step)
        saver.save(strategy.state(), Progress(step, (0, 0, step)))
        saver.wait()


@pytest.mark.soak
@pytest.mark.parametrize("storage", ["folder", "s3"])
def test_a_half_checkpoint_is_never_found(
    settings: RunSettings, on_s3: RunSettings, s3: Faulty, tmp_path: Path, ranks: Ranks, storage: str
) -> None:
    """SIGKILL at twenty moments of writing and uploading, of which each is another."""
    if storage == "s3":
        settings = on_s3
    run, moments, newest, half = locate(settings.runs) / settings.name, Random(0), 0, 0
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.train.making"])
    for number in range(20):
        folder = tmp_path / f"trial-{number}"
        folder.mkdir()
        mine, others = context.Pipe()
        process = context.Process(target=save_until_killed, args=(folder, settings, s3.url, others))
        process.start()
        for _ in range(2 + number % 3):  # when the second one is begun the first is there
            assert mine.poll(LONG)
            step = mine.recv()
        if storage == "s3":
            due = s3.requests + moments.randrange(20)  # about as many as a checkpoint takes
            while s3.requests < due:
                time.sleep(0.001)
        else:
            time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.join()
        found = [int(one.name.removeprefix("step-")) for one in checkpoint.committed(run)]
        assert found == sorted(set(found))
        assert step - 1 <= found[-1]
        half += len(set(checkpoint.folder(run).names())) - len(found)
        newest = max(newest, found[-1])
        assert found[-1] == newest
        loaded = ranks.run(1, load_newest, settings, s3.url)[0]
        assert loaded == {float(newest)}
    assert half > 0  # some moments were in the middle


def load_newest(rank: int, workers: int, settings: RunSettings, endpoint: str) -> set[float]:
    """All that the newest checkpoint's weights hold."""
    os.environ.update(KEYS, AWS_ENDPOINT_URL=endpoint)
    strategy = fresh_strategy(settings)
    state = strategy.state()
    checkpoint.resume(locate(settings.runs) / settings.name, state)
    return {value for part in state["model"].values() for value in part.full_tensor().unique().tolist()}
