"""Shards, run, checkpoints, artifact and tokenizer on S3: the same numbers as in folders."""

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mqwen.model import MQWenLMHeadModel
from mqwen.storage import Location, local_folder
from mqwen.train.build import build_model, starting_point
from mqwen.train.export import export
from mqwen.train.loop import Progress
from mqwen.train.run import open_run
from mqwen.train.settings import ModelSettings, RunSettings
from tests.train.conftest import Ranks
from tests.train.making import fresh_strategy, other_seed, rows_from
from tests.train.test_checkpoint import assert_same, flat, load_latest, train_and_save


@pytest.fixture
def variables(bucket: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment in which S3 is found, and in which copies are the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "XDG_"))}


@pytest.fixture
def on_s3(settings: RunSettings, bucket: Location, dataset: Path, tokenizer: Path) -> RunSettings:
    """The settings, with all that they name on S3."""
    for folder, name in ((dataset, "data"), (tokenizer, "tokenizer")):
        for file in folder.iterdir():
            (bucket / name / file.name).upload(file)
    data = replace(settings.data, dataset=f"{bucket}/data")
    return replace(settings, runs=f"{bucket}/runs", tokenizer=f"{bucket}/tokenizer", data=data, steps=2)


def save(rank: int, workers: int, variables: dict[str, str], settings: RunSettings) -> tuple[Progress, dict[str, Any]]:
    os.environ.update(variables)
    return train_and_save(rank, workers, settings, stop_after=2)[1:]


def load(rank: int, workers: int, variables: dict[str, str], settings: RunSettings) -> tuple[Progress, dict[str, Any]]:
    os.environ.update(variables)
    strategy = fresh_strategy(other_seed(settings))  # nothing of the saved weights is there by chance
    return load_latest(settings, strategy), flat(strategy.state())


def test_from_shards_to_an_artifact(
    ranks: Ranks, settings: RunSettings, on_s3: RunSettings, bucket: Location, variables: dict[str, str]
) -> None:
    rows = zip(rows_from(settings, Progress()), rows_from(on_s3, Progress()), strict=True)
    for here, there in itertools.islice(rows, 3):
        assert_same(there.inputs, here.inputs)

    with open_run(on_s3, *starting_point(on_s3)) as run:
        pass
    progress, saved = ranks.run(2, save, variables, on_s3)[0]
    assert progress.step == 2
    for loaded in ranks.run(2, load, variables, on_s3):
        assert loaded[0] == progress
        assert_same(loaded[1], saved)

    for form in ("llava", "artifact"):  # the second over the first
        assert export(run, bucket / "artifact", form=form) == 2
    artifact = MQWenLMHeadModel.from_pretrained(local_folder(bucket / "artifact"))
    weights = {f"/model/{name}": tensor for name, tensor in artifact.state_dict().items()}
    assert_same(weights, {name: value for name, value in saved.items() if name.startswith("/model/")})

    start = replace(on_s3, tokenizer="", model=ModelSettings(init_from=f"{bucket}/artifact"))
    config, processor = starting_point(start)
    assert processor.tokenizer.fingerprint == starting_point(settings)[1].tokenizer.fingerprint
    with torch.no_grad():
        assert_same(dict(build_model(start, config).state_dict()), dict(artifact.state_dict()))
