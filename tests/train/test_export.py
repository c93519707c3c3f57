"""From a run's checkpoint to an artifact that transformers' own words open."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from mqwen.storage import StorageError, locate
from mqwen.train.build import starting_point
from mqwen.train.checkpoint import CheckpointError
from mqwen.train.export import export
from mqwen.train.loop import Progress
from mqwen.train.run import open_run
from mqwen.train.settings import RunSettings
from tests.train.conftest import Ranks
from tests.train.making import fresh_model, rows_from, tiny_settings, train_and_keep


@pytest.fixture(scope="module")
def settings(tokenizer: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    return tiny_settings(tokenizer, dataset, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def trained(ranks: Ranks, settings: RunSettings) -> dict[int, dict[str, torch.Tensor]]:
    with open_run(settings, *starting_point(settings)):
        pass
    return ranks.run(2, train_and_keep, settings)[0]


@pytest.fixture
def run(trained: object, settings: RunSettings, tmp_path: Path) -> Path:
    return shutil.copytree(Path(settings.runs) / settings.name, tmp_path / "run")


@pytest.mark.parametrize("step", [None, 4])
def test_an_artifact_holds_the_trained_weights(
    run: Path, trained: dict[int, dict[str, Any]], settings: RunSettings, tmp_path: Path, step: int | None
) -> None:
    assert export(locate(run), locate(tmp_path / "artifact"), step) == (step or 6)
    opened = MQWenLMHeadModel.from_pretrained(tmp_path / "artifact")
    expected = fresh_model(settings)
    expected.load_state_dict(trained[step or 6])
    (row,) = itertools.islice(rows_from(settings, Progress()), 1)
    inputs = {name: row.inputs[name] for name in ("input_ids", "pixel_values", "segment_ids")}
    with torch.inference_mode():
        assert torch.equal(opened(**inputs).logits, expected.eval()(**inputs).logits)
        other = fresh_model(settings)
        other.load_state_dict(trained[2])
        assert not torch.equal(opened(**inputs).logits, other.eval()(**inputs).logits)


def test_an_artifact_knows_where_answers_stop(run: Path, settings: RunSettings, tmp_path: Path) -> None:
    export(locate(run), locate(tmp_path / "artifact"))
    processor = MQWenProcessor.from_pretrained(tmp_path / "artifact")
    assert processor.image_size == 16
    assert processor.tokenizer.fingerprint == starting_point(settings)[1].tokenizer.fingerprint
    stops = MQWenLMHeadModel.from_pretrained(tmp_path / "artifact").generation_config.eos_token_id
    assert set(processor.tokenizer.convert_ids_to_tokens(stops)) == {"<|im_end|>", "<|endoftext|>"}


def test_a_run_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}/missing has no committed checkpoint"):
        export(locate(tmp_path / "missing"), locate(tmp_path / "artifact"))
    assert not (tmp_path / "artifact").exists()


def test_a_step_that_is_missing_is_answered_with_those_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; there are .*2, .*4, .*6"):
        export(locate(run), locate(tmp_path / "artifact"), step=5)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("checkpoints/step-00000006/.metadata", "run/checkpoints/step-00000006/.metadata"),
        ("model/config.json", "run/model is not what training wrote there"),
        ("model/qwen.tiktoken", "run/model is not what training wrote there"),
    ],
)
def test_a_file_that_is_missing_or_cut_is_named(run: Path, tmp_path: Path, file: str, message: str) -> None:
    content = (run / file).read_bytes()
    (run / file).write_bytes(content[: len(content) // 3])
    with pytest.raises(CheckpointError, match=message):
        export(locate(run), locate(tmp_path / "artifact"))
    (run / file).unlink()
    with pytest.raises(CheckpointError, match=message):
        export(locate(run), locate(tmp_path / "artifact"))
    assert not (tmp_path / "artifact").exists()


def test_an_export_replaces_one_of_another_form_whole(run: Path, tmp_path: Path) -> None:
    names = {}
    for target, forms in (("once", ["artifact"]), ("twice", ["llava", "artifact"])):
        for form in forms:
            export(locate(run), locate(tmp_path / target), form=form)  # type: ignore[arg-type]
        names[target] = {path.name for path in (tmp_path / target).iterdir()}
    assert names["once"] == names["twice"]


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": '{"model_type": "llama"}', "model.safetensors": "", "qwen.tiktoken": ""},
        {"config.json": '{"model_type": "llava"}', "model.safetensors": ""},  # somebody's LLaVA
        {"config.json": '{"model_type": "mqwen"}', "qwen.tiktoken": ""},  # a run's model/
        {"config.json": "[]"},
        {"config.json": "mine"},
    ],
)
def test_what_no_export_wrote_is_not_replaced(run: Path, tmp_path: Path, files: dict[str, str]) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for name, text in files.items():
        (target / name).write_text(text)
    with pytest.raises(StorageError, match="no export wrote there; choose another place"):
        export(locate(run), locate(target))
    assert {path.name: path.read_text() for path in target.iterdir()} == files


def test_a_target_inside_of_the_run_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    before = sorted(run.rglob("*"))
    for target in (run, run / "model", run / "new", tmp_path / "link" / "new", run / ".." / "run" / "new"):
        with pytest.raises(StorageError, match=f"lies inside of the run {run}, .* choose a place beside it"):
            export(locate(run), locate(target))
    assert sorted(run.rglob("*")) == before
