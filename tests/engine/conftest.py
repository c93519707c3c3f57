from pathlib import Path

import pytest
import torch

from tests.engine.tiny import build_artifact


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # the model is tiny, and more threads would wait for one another
    return build_artifact(tmp_path_factory.mktemp("engine") / "tiny")
