"""Published folders whose weights are pickles: read only when asked, and only as tensors."""

import json
import os
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file

from mqwen.model import MQWenLMHeadModel
from mqwen.model.components import read_weights
from mqwen.model.errors import CheckpointError
from tests.model.golden import FIXTURES


@pytest.fixture
def pickles(tmp_path: Path) -> Path:
    """The tiny parts as torch.save writes them: Qwen in two shards, CLIP in the form of before 2020, the projector."""
    for name in ("tiny-qwen", "tiny-clip"):
        copytree(FIXTURES / name, tmp_path / name)
    qwen = dict(read_weights(tmp_path / "tiny-qwen"))
    for file in (tmp_path / "tiny-qwen").glob("model*"):
        file.unlink()
    files = {name: f"pytorch_model-{1 + number % 2:05d}-of-00002.bin" for number, name in enumerate(qwen)}
    for file in set(files.values()):
        torch.save({name: qwen[name] for name in files if files[name] == file}, tmp_path / "tiny-qwen" / file)
    (tmp_path / "tiny-qwen" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    clip = tmp_path / "tiny-clip" / "model.safetensors"
    torch.save(load_file(clip), clip.with_name("pytorch_model.bin"), _use_new_zipfile_serialization=False)
    clip.unlink()
    torch.save(load_file(FIXTURES / "feature_proj.safetensors"), tmp_path / "projector.bin")
    return tmp_path


def test_pickles_hold_the_same_weights(pickles: Path) -> None:
    parts = [FIXTURES / "tiny-qwen", FIXTURES / "tiny-clip", FIXTURES / "feature_proj.safetensors"]
    expected = MQWenLMHeadModel.from_components(*parts, image_token_id=500).state_dict()
    parts = [pickles / "tiny-qwen", pickles / "tiny-clip", pickles / "projector.bin"]
    found = MQWenLMHeadModel.from_components(*parts, image_token_id=500, pickled=True).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_pickles_are_not_read_unless_asked(pickles: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors; pickled=True also reads pytorch_model"):
        MQWenLMHeadModel.from_components(pickles / "tiny-qwen", FIXTURES / "tiny-clip", image_token_id=500)
    with pytest.raises(CheckpointError, match=r"projector\.bin is truncated or no safetensors file"):
        MQWenLMHeadModel.from_components(
            FIXTURES / "tiny-qwen", FIXTURES / "tiny-clip", pickles / "projector.bin", image_token_id=500
        )


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_no_code(pickles: Path) -> None:
    made = pickles / "made"
    torch.save({"0.weight": Touch(made)}, pickles / "projector.bin")
    with pytest.raises(CheckpointError, match=r"projector\.bin cannot be read as tensors only"):
        parts = [pickles / "tiny-qwen", pickles / "tiny-clip", pickles / "projector.bin"]
        MQWenLMHeadModel.from_components(*parts, image_token_id=500, pickled=True)
    assert not made.exists()
