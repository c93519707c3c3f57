"""From a training checkpoint to an artifact, an adapter, or the folder that other servers read."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor
from mqwen.model.llava import export_llava
from mqwen.model.vocabulary import VOCABULARY_FILE
from mqwen.storage import Location, StorageError, filled
from mqwen.train import checkpoint
from mqwen.train.checkpoint import CheckpointError
from mqwen.train.settings import LoraSettings, SettingsError

Form = Literal["artifact", "adapter", "llava"]
LAST_FILE = {
    "artifact": "config.json",
    "adapter": "adapter_config.json",
    "llava": "config.json",
}  # whole, if it is there
MODEL_TYPES = ("mqwen", "llava")  # of what this file writes


def find_checkpoint(run: Location, step: int | None) -> Location:
    """The checkpoint of that step, or the newest. Raises CheckpointError that lists what is there."""
    found = checkpoint.committed(run)
    if not found:
        raise CheckpointError(f"{run} has no committed checkpoint; training writes them")
    if step is None:
        return found[-1]
    if (wanted := checkpoint.step_folder(run, step)) in found:
        return wanted
    raise CheckpointError(f"{run} has no checkpoint of step {step}; there are {', '.join(c.name for c in found)}")


def export(run: Location, target: Location, step: int | None = None, form: Form = "artifact") -> int:
    """Makes `target` hold a run's checkpoint, in place of an earlier export; returns the checkpoint's step.

    An adapter is merged into the weights, but for the form "adapter", which is PEFT's folder of it alone, with the
    modules that were trained beside it.

    Raises:
        StorageError: `target` holds something else, or lies inside of the run.
        CheckpointError, SettingsError: no such checkpoint, a damaged one, or none of this form.
    """
    _check_target(run, target, LAST_FILE[form])
    with filled(target, LAST_FILE[form]) as folder:
        return _write(run, folder, step, form)


def _check_target(run: Location, target: Location, last: str) -> None:
    """Files that no export wrote are not replaced."""
    if target.is_inside(run):
        raise StorageError(f"{target} lies inside of the run {run}, which is training's: choose a place beside it")
    if last != "config.json" or not (target / last).size():
        return  # an adapter, or nothing that is looked at here
    try:
        kind = json.loads((target / last).read_bytes()).get("model_type")
    except (ValueError, AttributeError):
        kind = None
    weights = any(name.endswith(".safetensors") for name in target.names())
    if kind not in MODEL_TYPES or VOCABULARY_FILE not in target.names() or not weights:
        raise StorageError(
            f"{target} holds a config.json of model_type {kind!r} that no export wrote there; choose another place, or "
            "take away what is in it"
        )


def _write(run: Location, target: Path, step: int | None, form: Form) -> int:
    source = find_checkpoint(run, step)
    commit = checkpoint.read_commit(source)  # a missing or truncated file shows before the model is built
    lora = LoraSettings(**commit.settings["model"].get("lora", {}))
    if form == "adapter" and not lora.r:
        raise SettingsError(f"{run} trained no adapter, but the weights themselves: export them with --form artifact")
    with tempfile.TemporaryDirectory() as local:
        for name in (run / "model").names():
            (run / "model" / name).download(Path(local) / name)
        try:
            config = MQWenConfig.from_json_file(Path(local) / "config.json")  # from_pretrained does without the file
            processor = MQWenProcessor.from_pretrained(local)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{run / 'model'} is not what training wrote there: {error}") from error
    with torch.device("meta"):
        model = MQWenLMHeadModel(config)
        if lora.r:
            from mqwen.model.adapters import add_adapter  # brings peft, whose import other exports need not wait for

            adapted = add_adapter(model, **asdict(lora))
    weights = model.to_empty(device="cpu").state_dict()
    checkpoint.load(source, {"model": weights})
    model.load_state_dict(weights)
    if form == "adapter":
        adapted.save_pretrained(target)
        return commit.progress.step
    if lora.r:
        adapted.merge_and_unload()
    model.generation_config.eos_token_id = processor.tokenizer.stop_ids
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    if form == "llava":
        export_llava(model, processor, target)
    else:
        model.save_pretrained(target)
        processor.save_pretrained(target)
    return commit.progress.step
