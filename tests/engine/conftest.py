from pathlib import Path

import pytest
import torch

from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from tests.engine.tiny import build_artifact


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # the model is tiny, and more threads would wait for one another
    return build_artifact(tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture(scope="session")
def processor(artifact: Path) -> MQWenProcessor:
    return MQWenProcessor.from_pretrained(artifact)


@pytest.fixture(scope="session")
def model(artifact: Path) -> MQWenLMHeadModel:
    return MQWenLMHeadModel.from_pretrained(artifact).eval()
