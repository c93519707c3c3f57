"""What evaluation and service load is the same, and on a card takes its kernels."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mqwen.engine.engine import runner_of
from mqwen.engine.loading import dtype_for, load_artifact
from mqwen.engine.paged import cache_bytes
from mqwen.engine.runner import Runner
from mqwen.model import MQWenConfig
from mqwen.model.errors import ConfigurationError


def test_a_card_gets_its_kernels() -> None:
    pytest.importorskip("triton")
    from mqwen.engine.cuda.runner import CudaRunner

    card, dtype = torch.device("cuda"), dtype_for(gpu=True)
    assert isinstance(dtype, torch.dtype)
    assert runner_of(MQWenConfig(), card, dtype) is CudaRunner
    assert runner_of(MQWenConfig(), card, torch.float32) is Runner
    assert runner_of(MQWenConfig(rotary_pct=0.5), card, dtype) is Runner
    assert runner_of(MQWenConfig(), torch.device("cpu"), dtype) is Runner


def test_the_cpu_keeps_the_files_dtype(artifact: Path) -> None:
    model, _ = load_artifact(artifact, gpu=False)
    assert model.dtype == torch.float32


def test_another_processor_is_refused(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(ConfigurationError, match="image_mean"):
        load_artifact(tmp_path, gpu=False)


def test_graphs_take_any_number_of_sequences() -> None:
    pytest.importorskip("triton")
    from mqwen.engine.cuda.runner import counts_for

    assert counts_for(1) == [1]
    assert counts_for(5) == [1, 2, 4, 8]
    assert counts_for(600)[-2:] == [512, 600]


def test_two_replicas_on_one_card_leave_each_other_their_half() -> None:
    total, held = 100, 10
    first = cache_bytes(free=total - held, total=total, held=held, share=0.5)
    second = cache_bytes(free=total - 2 * held - first, total=total, held=held, share=0.5)
    assert first == second == 32
    assert cache_bytes(free=total - held, total=total, held=held, share=1.0) == 72
    assert cache_bytes(free=5, total=total, held=60, share=0.5) == 0
