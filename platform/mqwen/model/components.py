"""Reading folders of weights: published Qwen v1 and CLIP checkpoints, and the files of our own artifact.

Safetensors, unless the caller asks for pickles too: those are read by torch's weights-only loading, which runs no code
of theirs.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mqwen.model.configuration import MQWenConfig
from mqwen.model.errors import CheckpointError
from mqwen.model.files import Folder, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def weight_files(folder: Path, *, pickled: bool = False) -> list[Path]:
    """The weight files of a folder: one, or the shards that its index names. Safetensors come before pickles.

    Raises:
        CheckpointError: a file is missing, or the folder holds other formats only.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder")
    safe = (folder / INDEX).exists() or (folder / WEIGHTS).exists()
    whole, index = (PICKLED, PICKLED_INDEX) if pickled and not safe else (WEIGHTS, INDEX)
    if (folder / index).exists():
        shards = read_json(folder / index).get("weight_map")
        if not isinstance(shards, dict) or not all(Path(str(name)).name == name for name in shards.values()):
            raise CheckpointError(f"{folder / index} has no weight_map of file names in this folder")
        files = [folder / name for name in sorted(set(shards.values()))]
    else:
        files = [folder / whole]
    for file in files:
        if not file.is_file():
            hint = "; pickled=True also reads pytorch_model*.bin" if next(folder.glob("*.bin"), None) else ""
            raise CheckpointError(f"{folder} has no {file.name}{'' if pickled else hint}")
    return files


def read_weights(folder: Path, *, pickled: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a folder, one at a time.

    Raises:
        CheckpointError: a file is missing or truncated.
    """
    for file in weight_files(folder, pickled=pickled):
        yield from read_tensors(file, pickled=pickled)


def read_tensors(file: Path, *, pickled: bool) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one file: safetensors, or where it is called *.bin and `pickled` allows it a pickle.

    Raises:
        CheckpointError: the file is missing, truncated or of another kind.
    """
    if pickled and file.suffix == ".bin":
        yield from read_pickle(file).items()
    else:
        yield from read_safetensors(file)


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors that torch.save wrote, read without running code.

    Raises:
        CheckpointError: the file is missing, truncated, or holds anything but tensors by name.
    """
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as tensors only: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file} holds no dictionary of tensors")
    return content


def read_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one file, one at a time.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                yield name, tensors.get_tensor(name)
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or no safetensors file: {error}") from None


def components_config(qwen: Folder, clip: Folder, image_token_id: int | None) -> MQWenConfig:
    """Configuration for a published Qwen v1 folder and a published CLIP folder."""
    language = read_json(Path(qwen) / "config.json")
    if language.get("model_type") != "qwen":
        raise CheckpointError(f"{qwen} is of model_type {language.get('model_type')!r}, not Qwen v1's 'qwen'")
    vision = read_json(Path(clip) / "config.json")
    vision = vision.get("vision_config") or vision
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise CheckpointError(f"{clip} is of model_type {vision.get('model_type')!r}, not CLIP")
    known = MQWenConfig().to_dict().keys() - {"model_type", "transformers_version", "architectures", "dtype"}
    fields = {name: value for name, value in language.items() if name in known}
    fields |= {name: language[name] for name in ("attn_dropout_prob", "emb_dropout_prob") if language.get(name)}
    processor = Path(clip) / "preprocessor_config.json"
    if processor.exists():
        fields |= {k: v for k, v in read_json(processor).items() if k in ("image_mean", "image_std")}
    if image_token_id is not None:
        fields["image_token_id"] = image_token_id
    return MQWenConfig(**fields, vision_config=vision)


def component_weights(
    qwen: Folder, clip: Folder, projector: Folder | None, *, pickled: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The published folders' tensors under this model's names; those of CLIP's text side are left out."""
    for name, tensor in read_weights(Path(qwen), pickled=pickled):
        if not name.endswith("rotary_emb.inv_freq"):  # old exports hold this buffer; it is computed here
            yield name, tensor
    for name, tensor in read_weights(Path(clip), pickled=pickled):
        if name.startswith("vision_model.") and not name.endswith("position_ids"):
            yield f"visual.{name}", tensor
    if projector is not None:
        for name, tensor in read_tensors(Path(projector), pickled=pickled):
            yield f"feature_proj.{name}", tensor


def load_components(model: torch.nn.Module, weights: Iterator[tuple[str, Tensor]], *, projector: bool) -> None:
    """Copy tensors into the model by name.

    Raises:
        CheckpointError: a name that the model lacks, a parameter that got none, or another shape.
    """
    parameters = dict(model.named_parameters())
    waiting = {name for name in parameters if projector or not name.startswith("feature_proj.")}
    for name, tensor in weights:
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"{name} is no parameter of this model")
        if parameter.shape != tensor.shape:
            raise CheckpointError(f"{name} is {tuple(tensor.shape)}, the configuration asks {tuple(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(tensor)
        waiting.discard(name)
    if waiting:
        raise CheckpointError(f"{len(waiting)} parameters are in none of the files, first {min(waiting)}")
