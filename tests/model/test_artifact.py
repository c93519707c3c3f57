"""An artifact that is not whole is refused before a weight is read, with the file and the tensor named."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import mqwen.model.auto  # noqa: F401 (it registers)
from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor, MQWenTokenizer
from mqwen.model.artifact import check_artifact, open_artifact
from mqwen.model.errors import ArtifactError, ArtifactVersionError, CheckpointError, ConfigurationError
from tests.model.small import small_model

FIRST_VERSION = Path(__file__).parent / "fixtures_text" / "artifact_v1"
NORM = "transformer.ln_f.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    small_model().save_pretrained(folder / "whole")
    small_model().save_pretrained(folder / "sharded", max_shard_size="20KB")
    return folder


def refused(folder: Path, error: type[ArtifactError] = ArtifactError) -> ArtifactError:
    """What check_artifact says, and from_pretrained with it."""
    with pytest.raises(error) as caught:
        check_artifact(folder)
    with pytest.raises(error) as again:
        MQWenLMHeadModel.from_pretrained(folder)
    assert str(again.value) == str(caught.value)
    return caught.value


def test_whole_artifacts_pass_and_load(saved: Path) -> None:
    assert len(list((saved / "sharded").glob("*.safetensors"))) > 2
    for folder in (saved / "whole", saved / "sharded"):
        assert check_artifact(folder).to_diff_dict() == MQWenConfig.from_pretrained(folder).to_diff_dict()
        for options in ({}, {"device_map": "auto"}, {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}):
            loaded = MQWenLMHeadModel.from_pretrained(folder, **options)
            pairs = zip(loaded.parameters(), small_model().parameters(), strict=True)
            assert all(a.equal(b.to(options.get("dtype", torch.float32))) for a, b in pairs)


def read(file: Path) -> dict[str, torch.Tensor]:
    return load(file.read_bytes())  # not mapped: the file is written over


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = read(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def cut(file: str, keep: float) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(
        (folder / file).read_bytes()[: int((folder / file).stat().st_size * keep)]
    )


def pickled(folder: Path) -> None:
    torch.save(read(folder / "model.safetensors"), folder / "model.safetensors")


def bare_pickle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))


def renamed_to_bin(folder: Path) -> None:
    pickled(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "tensor", "message"),
    [
        (change_weights(lambda w: w.pop(NORM)), NORM, "missing, and 0 more"),
        (change_weights(lambda w: w.update(extra=torch.zeros(2))), "extra", "no parameter of this model"),
        (
            change_weights(lambda w: w.update({NORM: torch.zeros(31)})),
            NORM,
            "shape (31,), but config.json asks for (32,)",
        ),
        (change_weights(lambda w: w.update({NORM: torch.zeros(32).long()})), NORM, "dtype I64; allowed are F64"),
        (cut("model.safetensors", 0.9), None, "cut short or no safetensors"),
        (cut("model.safetensors", 0.01), None, "cut short or no safetensors"),
        (cut("model.safetensors", 0), None, "cut short or no safetensors"),
        (pickled, None, "is a pickle (torch.save)"),
        (bare_pickle, None, "is a pickle (torch.save)"),
        (renamed_to_bin, None, "is missing; pytorch_model.bin is a pickle, which is not read"),
    ],
)
def test_a_damaged_weight_file_is_refused(
    saved: Path, tmp_path: Path, damage: Callable[[Path], None], tensor: str | None, message: str
) -> None:
    folder = shutil.copytree(saved / "whole", tmp_path / "artifact")
    damage(folder)
    error = refused(folder)
    assert error.file == str(folder / "model.safetensors")
    assert error.tensor == tensor
    assert message in str(error)
    assert error.file in str(error)
    assert (tensor or "") in str(error)


def change_json(name: str, **values: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps(content))

    return apply


def test_a_newer_format_version_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "whole", tmp_path / "artifact")
    change_json("config.json", format_version=2)(folder)
    error = refused(folder, ArtifactVersionError)
    assert "format_version 2 was written by a newer mqwen; this one reads up to 1" in str(error)
    assert error.file == str(folder / "config.json")
    change_json("config.json", hidden_size={"by": "a newer one"})(folder)
    for automatic in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ArtifactVersionError) as caught:
            automatic.from_pretrained(folder)
        assert str(caught.value) == str(error)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_json("config.json", format_version=None), "format_version is None; an artifact has 1 to 1"),
        (change_json("config.json", format_version="1"), "format_version is '1'"),
        (change_json("config.json", model_type="qwen"), "model_type is 'qwen', not 'mqwen'.*from_components"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: is missing"),
        (cut("config.json", 0.5), r"config\.json: cannot be read as JSON"),
    ],
)
def test_a_configuration_that_is_none_is_refused(
    saved: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(saved / "whole", tmp_path / "artifact")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        check_artifact(folder)
    with pytest.raises(CheckpointError, match="no folder"):
        check_artifact(folder / "absent")


GARBAGE = [b"", b"{", b"\xff\xfe\x00", b"[]", b'"x"', b"null", b"[" * 100_000]


@pytest.mark.parametrize("content", GARBAGE)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "adapter_config.json",
    ],
)
def test_a_small_file_of_garbage_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = shutil.copytree(FIRST_VERSION, tmp_path / "artifact")
    (folder / name).write_bytes(content)
    if name == "chat_template.jinja" and b"\xff" not in content:
        assert open_artifact(folder)[1].tokenizer.chat_template == content.decode()
        return
    with pytest.raises(ArtifactError) as caught:
        open_artifact(folder)
    assert caught.value.file == str(folder / name)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config.json", {"vocab_size": None}, "vocab_size"),
        ("config.json", {"dtype": "foo"}, "dtype"),
        ("preprocessor_config.json", {"image_mean": None}, "image_mean=None"),
        ("preprocessor_config.json", {"image_std": "abc"}, "image_std=abc"),
        ("preprocessor_config.json", {"size": "x", "crop_size": ["x"]}, "size=x"),
        ("preprocessor_config.json", {"rescale_factor": "x"}, "rescale_factor=x"),
        ("tokenizer_config.json", {"padding_side": 5}, "no tokenizer can be made"),
        ("tokenizer_config.json", {"pad_token": [5]}, "no tokenizer can be made"),
    ],
)
def test_a_small_file_of_odd_values_is_named(
    tmp_path: Path, name: str, values: dict[str, object], message: str
) -> None:
    folder = shutil.copytree(FIRST_VERSION, tmp_path / "artifact")
    change_json(name, **values)(folder)
    with pytest.raises((ArtifactError, ConfigurationError), match=f"{folder / name}: .*{message}"):
        open_artifact(folder)


def test_shards_that_do_not_fit_their_index_are_refused(saved: Path, tmp_path: Path) -> None:
    def damaged(name: str) -> tuple[Path, dict[str, str]]:
        folder = shutil.copytree(saved / "sharded", tmp_path / name)
        return folder, json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    index = "model.safetensors.index.json"

    folder, listed = damaged("a shard is missing")
    (folder / listed[NORM]).unlink()
    error = refused(folder)
    assert (error.file, error.tensor) == (str(folder / listed[NORM]), None)

    folder, listed = damaged("a tensor is in none")
    weights = read(folder / listed[NORM])
    del weights[NORM]
    save_file(weights, folder / listed[NORM])
    error = refused(folder)
    assert (error.file, error.tensor) == (str(folder / listed[NORM]), NORM)

    folder, listed = damaged("a tensor is in two")
    other = next(file for file in listed.values() if file > listed[NORM] or file < listed[NORM])
    save_file(read(folder / other) | {NORM: torch.zeros(32)}, folder / other)
    error = refused(folder)
    assert error.tensor == NORM

    folder, listed = damaged("the index leaves one out")
    (folder / index).write_text(json.dumps({"weight_map": {k: v for k, v in listed.items() if k != NORM}}))
    assert refused(folder).tensor == NORM

    for name, weight_map in (("nothing", {}), ("a list", []), ("another folder", listed | {NORM: "../x.safetensors"})):
        folder, listed = damaged(name)
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
        assert refused(folder).file == str(folder / index)


@pytest.mark.parametrize("automatic", [None, AutoModelForCausalLM, AutoModelForImageTextToText])
def test_an_artifact_of_the_first_version_opens_and_computes_what_it_did(automatic: Any) -> None:
    """By its own classes, and by transformers' Auto classes."""
    recorded = json.loads((FIRST_VERSION / "recorded.json").read_text())
    assert check_artifact(FIRST_VERSION).format_version == 1
    processor = (AutoProcessor if automatic else MQWenProcessor).from_pretrained(FIRST_VERSION)
    assert type(processor) is MQWenProcessor
    assert processor.tokenizer.fingerprint == recorded["fingerprint"]
    picture = (FIRST_VERSION.parent / "chessboard_RGB.png").read_bytes()
    inputs = processor(messages=recorded["messages"], images=[picture], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == recorded["input_ids"]
    model = (automatic or MQWenLMHeadModel).from_pretrained(FIRST_VERSION)
    assert type(model) is MQWenLMHeadModel
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(recorded["last_logits"]), rtol=0, atol=5e-5)
    if automatic:
        tokenizer = AutoTokenizer.from_pretrained(FIRST_VERSION)
        assert (type(tokenizer), tokenizer.fingerprint) == (MQWenTokenizer, recorded["fingerprint"])
        config = AutoConfig.from_pretrained(FIRST_VERSION)
        assert (type(config), config.hidden_size) == (MQWenConfig, model.config.hidden_size)
