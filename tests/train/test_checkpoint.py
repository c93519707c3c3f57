"""Checkpoints: what was saved comes back, training goes on as if undisturbed, and what is damaged is refused."""

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import fsspec.implementations.local
import pyarrow.fs as pafs
import pytest
import torch
from torch.distributed.tensor import DTensor

from mqwen.storage import Location, locate
from mqwen.train import checkpoint
from mqwen.train.checkpoint import COMMIT, CheckpointError
from mqwen.train.export import find_checkpoint
from mqwen.train.loop import Progress
from mqwen.train.saver import Saver
from mqwen.train.settings import CheckpointSettings, RunSettings
from mqwen.train.status import run_statuses
from mqwen.train.strategy import Strategy
from tests.train.conftest import Ranks
from tests.train.making import fresh_model, fresh_strategy, other_seed, tiny_settings, train_ranks


def run_of(settings: RunSettings) -> Location:
    return locate(settings.runs) / settings.name


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """Every value of a nested state by its path, tensors whole and copied."""
    if isinstance(state, dict):
        return {path: value for key, part in state.items() for path, value in flat(part, f"{name}/{key}").items()}
    if isinstance(state, DTensor):
        state = state.full_tensor()
    return {name: state.detach().clone() if isinstance(state, torch.Tensor) else state}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


def load_latest(settings: RunSettings, strategy: Strategy) -> Progress:
    state = strategy.state()
    progress = checkpoint.resume(run_of(settings), state)
    strategy.load_state(state)
    return progress


class StoppedError(Exception):
    """The fault that ends a training in the middle."""


def train_and_save(
    rank: int, workers: int, settings: RunSettings, stop_after: int
) -> tuple[list[float], Progress, dict[str, Any]]:
    """Trains to a checkpoint's step; gives losses, progress and the whole state at that moment."""
    strategy, records, place = fresh_strategy(settings), [], Progress()
    saver = Saver(run_of(settings), settings)

    def save(progress: Progress) -> None:
        nonlocal place
        saver.save(strategy.state(), progress)
        place = progress
        if progress.step == stop_after:
            raise StoppedError

    with suppress(StoppedError):
        records, _ = train_ranks(settings, strategy, Progress(), rank, workers, save)
    saver.wait()
    return [record.loss for record in records], place, flat(strategy.state())


def resume(
    rank: int, workers: int, settings: RunSettings
) -> tuple[dict[str, Any], Progress, list[float], dict[str, Any]]:
    """From the newest checkpoint to the end: the loaded state, its progress, losses and the state at the end."""
    strategy = fresh_strategy(other_seed(settings))  # nothing of the saved weights is there by chance
    progress = load_latest(settings, strategy)
    loaded = flat(strategy.state())
    records, _ = train_ranks(settings, strategy, progress, rank, workers, lambda progress: None)
    return loaded, progress, [record.loss for record in records], flat(strategy.state())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_training_goes_on_as_if_undisturbed(ranks: Ranks, settings: RunSettings, workers: int) -> None:
    losses, _, at_the_end = ranks.run(workers, train_and_save, replace(settings, name="undisturbed"), 0)[0]
    _, saved_at, saved = ranks.run(workers, train_and_save, settings, 4)[0]
    assert saved_at.step == 4
    assert saved_at == checkpoint.progress(run_of(settings))
    assert any("exp_avg_sq" in name for name in saved)
    for loaded, progress, rest, after in ranks.run(workers, resume, settings):
        assert_same(loaded, saved)
        assert progress == saved_at
        assert rest == losses[4:]
        assert_same(after, at_the_end)


def test_two_workers_save_and_one_goes_on(ranks: Ranks, settings: RunSettings) -> None:
    losses, _, _ = ranks.run(1, train_and_save, replace(settings, name="undisturbed"), 0)[0]
    _, saved_at, saved = ranks.run(2, train_and_save, settings, 4)[0]
    ((loaded, progress, rest, _),) = ranks.run(1, resume, settings)
    assert_same(loaded, saved)
    assert progress == saved_at
    assert rest == pytest.approx(losses[4:], rel=1e-4)


@pytest.fixture(scope="module")
def written(ranks: Ranks, tokenizer: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers with checkpoints of the steps 2 and 4."""
    settings = tiny_settings(tokenizer, dataset, tmp_path_factory.mktemp("written"))
    ranks.run(2, train_and_save, settings, 4)
    return Path(run_of(settings).path)


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Location:
    return locate(shutil.copytree(written, tmp_path / "run"))


@pytest.fixture(scope="module")
def weights(tokenizer: Path, dataset: Path) -> dict[str, torch.Tensor]:
    return fresh_model(tiny_settings(tokenizer, dataset, Path())).state_dict()


def newest(run: Location) -> Path:
    return Path(checkpoint.committed(run)[-1].path)


def test_a_folder_without_commit_is_never_chosen(run: Location) -> None:
    assert [one.name for one in checkpoint.committed(run)] == ["step-00000002", "step-00000004"]
    shutil.copytree(newest(run), newest(run).with_name("step-00000006"), ignore=shutil.ignore_patterns(COMMIT))
    (newest(run).parent / "notes.txt").write_text("not a folder")
    assert newest(run).name == "step-00000004"
    assert checkpoint.progress(run).step == 4
    (newest(run) / COMMIT).unlink()
    assert newest(run).name == "step-00000002"
    with pytest.raises(CheckpointError, match="step-00000006 is no committed checkpoint"):
        checkpoint.read_commit(checkpoint.folder(run) / "step-00000006")


def test_a_run_that_has_none(tmp_path: Path) -> None:
    assert checkpoint.committed(locate(tmp_path / "nowhere")) == []
    assert checkpoint.progress(locate(tmp_path / "nowhere")) == Progress()


def part(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("part", cut, "were written; use another checkpoint"),
        ("part", flip, "is damaged: its SHA-256"),
        ("part", Path.unlink, "is missing"),
        (".metadata", cut, "were written; use another checkpoint"),
        (".metadata", flip, "is damaged: its SHA-256"),
        (".metadata", Path.unlink, "is missing"),
        (COMMIT, cut, "is damaged"),
        (COMMIT, Path.unlink, "is no committed checkpoint"),
        (COMMIT, lambda file: file.write_bytes(b""), "is damaged"),
        (COMMIT, lambda file: file.write_bytes(b"[1]"), "is damaged"),
        (COMMIT, lambda file: file.write_bytes(b"\xff\xfe"), "is damaged"),
        (COMMIT, lambda file: file.write_text('{"format_version": 2, "files": {}}'), "is damaged"),
    ],
)
def test_a_damaged_file_is_named(
    run: Location, weights: dict[str, torch.Tensor], name: str, damage: Callable[[Path], object], message: str
) -> None:
    folder = newest(run)
    file = part(folder) if name == "part" else folder / name
    damage(file)
    with pytest.raises(CheckpointError) as raised:
        checkpoint.load(locate(folder), {"model": weights})
    assert message in str(raised.value)
    assert str(folder if name == COMMIT and not file.exists() else file) in str(raised.value)


def test_a_newer_format_is_refused(run: Location) -> None:
    file = newest(run) / COMMIT
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 3, "something": "new"}))
    with pytest.raises(CheckpointError, match=r"step-00000004 has format version 3, this code reads 2"):
        checkpoint.load(locate(newest(run)), {})


def save_each_step(
    rank: int, workers: int, settings: RunSettings, losses: dict[int, float], stubborn: bool = False
) -> str:
    """What it prints."""
    filesystem = (
        pafs.PyFileSystem(pafs.FSSpecHandler(Stubborn(auto_mkdir=True))) if stubborn else pafs.LocalFileSystem()
    )
    run, strategy = Location(filesystem, run_of(settings).path, settings.name), fresh_strategy(settings)
    saver = Saver(run, settings)
    with redirect_stdout(StringIO()) as printed:
        for step, loss in losses.items():
            saver.save(strategy.state(), Progress(step, (0, 0, step)), loss)
        saver.wait()
    return printed.getvalue()


class Stubborn(fsspec.implementations.local.LocalFileSystem):
    """A storage that deletes files and no folders."""

    def rm(self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None) -> None:
        if recursive:
            raise OSError("folders stay")
        super().rm(path)


def kept(settings: RunSettings) -> list[str]:
    """What lies in the folder of checkpoints, also what is no checkpoint."""
    return checkpoint.folder(run_of(settings)).names()


def test_the_oldest_are_removed_but_for_the_best(ranks: Ranks, settings: RunSettings) -> None:
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 10: 3.0, 11: 2.0}
    ranks.run(1, save_each_step, replace(settings, checkpoint=CheckpointSettings(keep=2)), losses)
    assert kept(settings) == ["step-00000010", "step-00000011"]
    best = replace(settings, name="best", checkpoint=CheckpointSettings(keep=1, keep_best=2))
    ranks.run(1, save_each_step, best, losses)
    assert kept(best) == ["step-00000002", "step-00000011"]
    ranks.run(1, save_each_step, best, {12: 9.0})
    assert kept(best) == ["step-00000002", "step-00000011", "step-00000012"]


def test_a_damaged_old_checkpoint_spoils_no_other(ranks: Ranks, settings: RunSettings) -> None:
    """What is kept, exported or listed beside it."""
    settings = replace(settings, checkpoint=CheckpointSettings(keep=2, keep_best=1))
    ranks.run(1, save_each_step, settings, {1: 1.0, 2: 2.0})
    run = run_of(settings)
    cut(part(Path((checkpoint.folder(run) / "step-00000001").path)))
    ranks.run(1, save_each_step, settings, {3: 3.0, 4: 4.0, 5: 5.0})
    assert kept(settings) == ["step-00000002", "step-00000004", "step-00000005"]
    cut(part(Path((checkpoint.folder(run) / "step-00000002").path)))
    assert find_checkpoint(run, 4).name == "step-00000004"
    cut(newest(run) / COMMIT)
    (Path(run.path) / "settings.json").write_text('{"steps": 9}')
    (found,) = run_statuses(locate(settings.runs), [])
    assert (found.step, found.checkpoints, found.loss) == (5, [2, 4, 5], None)
    shutil.rmtree(newest(run))
    assert run_statuses(locate(settings.runs), [])[0].loss == 4.0


def test_a_deletion_that_breaks_leaves_no_half_checkpoint(ranks: Ranks, settings: RunSettings) -> None:
    settings = replace(settings, checkpoint=CheckpointSettings(keep=1))
    (printed,) = ranks.run(1, save_each_step, settings, {1: 1.0, 2: 1.0}, True)
    assert "warning: an old checkpoint stays:" in printed
    run = run_of(settings)
    assert (checkpoint.folder(run) / "step-00000001").names() != []
    assert [one.name for one in checkpoint.committed(run)] == ["step-00000002"]


def resume_saying(rank: int, workers: int, settings: RunSettings) -> tuple[Progress, list[float], str]:
    """Progress and losses as `resume` has them, and what is printed."""
    with redirect_stdout(StringIO()) as printed:
        _, progress, losses, _ = resume(rank, workers, settings)
    return progress, losses, printed.getvalue()


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(ranks: Ranks, settings: RunSettings, run: Location) -> None:
    settings = replace(settings, runs=str(Path(run.path).parent), name=run.name)
    losses, _, _ = ranks.run(1, train_and_save, replace(settings, name="undisturbed"), 0)[0]
    flip(part(newest(run)))
    found = ranks.run(2, resume_saying, settings)
    for progress, rest, _ in found:
        assert progress.step == 2
        assert rest == pytest.approx(losses[2:], rel=1e-4)
    (line,) = found[0][2].splitlines()
    assert line.startswith(f"warning: {part(newest(run))} is damaged: its SHA-256 is not the one that was written")
    assert line.endswith("trying the checkpoint before it")
    assert found[1][2] == ""

    (Path(checkpoint.folder(run).path) / "step-00000002" / COMMIT).write_text("{")
    before = sorted(Path(run.path).rglob("*"))
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints of .* are damaged, nothing was deleted: restore one"):
        ranks.run(2, resume, settings)
    assert sorted(Path(run.path).rglob("*")) == before


def test_a_step_is_written_again_over_a_half_or_damaged_one(ranks: Ranks, settings: RunSettings) -> None:
    ranks.run(2, save_each_step, settings, {2: 1.0})
    run = run_of(settings)
    flip(part(newest(run)))
    (newest(run) / "__7_0.distcp").write_bytes(b"of a larger group of workers")
    ranks.run(1, save_each_step, settings, {2: 1.0})
    assert checkpoint.read_commit(locate(newest(run))).files.keys() == set(locate(newest(run)).names()) - {COMMIT}
    ((_, progress, _, _),) = ranks.run(1, resume, settings)
    assert progress.step == 2


def test_progress_of_an_earlier_version_is_read(run: Location) -> None:
    """It said nothing of the epochs that are over."""
    file = newest(run) / COMMIT
    raw = json.loads(file.read_text())
    assert 0 < raw["progress"].pop("epochs") < 10
    raw["progress"]["place"][0] = 3
    file.write_text(json.dumps(raw))
    assert checkpoint.read_commit(locate(newest(run))).progress.epochs == 3
