"""An artifact's model and processor as an engine runs them: what is judged is what is served."""

from pathlib import Path

import torch

from mqwen.model import MQWenLMHeadModel, MQWenProcessor
from mqwen.model.artifact import open_artifact


def load_artifact(folder: Path, *, gpu: bool) -> tuple[MQWenLMHeadModel, MQWenProcessor]:
    """On a GPU in bfloat16, for which its kernels are made; on the CPU in the files' own dtype, mapped.

    Raises:
        As `open_artifact`: the folder may have been replaced since it was looked at last.
    """
    _, processor = open_artifact(folder)
    model = MQWenLMHeadModel.from_pretrained(folder, dtype=dtype_for(gpu=gpu)).eval()
    return model.to("cuda" if gpu else "cpu"), processor


def dtype_for(*, gpu: bool) -> torch.dtype | str:
    return torch.bfloat16 if gpu else "auto"
