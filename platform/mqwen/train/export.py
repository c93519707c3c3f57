"""From a training checkpoint to an artifact."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor
from mqwen.storage import Location
from mqwen.train import checkpoint
from mqwen.train.checkpoint import CheckpointError


def find_checkpoint(run: Location, step: int | None) -> Location:
    """The checkpoint of that step, or the newest. Raises CheckpointError that lists what is there."""
    found = checkpoint.committed(run)
    if not found:
        raise CheckpointError(f"{run} has no committed checkpoint; jobs/pretrain.py writes them")
    if step is None:
        return found[-1]
    for candidate in found:
        if checkpoint.read_commit(candidate).step == step:
            return candidate
    raise CheckpointError(f"{run} has no checkpoint of step {step}; there are {', '.join(c.name for c in found)}")


def export(run: Location, target: Path, step: int | None = None) -> int:
    """Writes the artifact of a run's checkpoint into the folder `target`; returns the checkpoint's step."""
    source = find_checkpoint(run, step)
    checkpoint.read_commit(source)  # a missing or truncated file shows before the model is built
    with tempfile.TemporaryDirectory() as local:
        for name in (run / "model").names():
            (run / "model" / name).download(Path(local) / name)
        try:
            config = MQWenConfig.from_json_file(Path(local) / "config.json")  # from_pretrained does without the file
            processor = MQWenProcessor.from_pretrained(local)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{run / 'model'} is not what jobs/pretrain.py wrote there: {error}") from error
    with torch.device("meta"):
        model = MQWenLMHeadModel(config)
    weights = model.to_empty(device="cpu").state_dict()
    commit = checkpoint.load(source, {"model": weights})
    model.load_state_dict(weights)
    model.generation_config.eos_token_id = processor.tokenizer.stop_ids
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(target)
    processor.save_pretrained(target)
    return commit.step
