"""Is this folder a whole artifact of ours? Answered from config.json and the headers, before any weight is read."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mqwen.model.components import INDEX, WEIGHTS
from mqwen.model.configuration import FORMAT_VERSION, MQWenConfig
from mqwen.model.errors import ArtifactError, ConfigurationError
from mqwen.model.files import Folder, read_json
from mqwen.model.processor import MQWenProcessor

ADAPTER = "adapter_config.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
# How files of torch.save start: a zip archive, or a bare pickle of protocol 2 and up.
_PICKLES = (b"PK\x03\x04", *(b"\x80%c" % protocol for protocol in range(2, 6)))


def check_artifact(directory: Folder) -> MQWenConfig:
    """Checks version, files, names, shapes and lengths; costs milliseconds, whatever the size of the weights.

    Returns:
        The artifact's configuration.

    Raises:
        ArtifactVersionError: written by a newer mqwen.
        ArtifactError: a file or tensor that is missing, one too many, of another shape or no float, a file cut short, a
            pickle. Its `file` and `tensor` say which.
        ConfigurationError: a configuration that no network can be built from.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ArtifactError(folder, "is no folder; an artifact is a local folder as save_pretrained writes it")
    if (folder / ADAPTER).exists():  # transformers would read it, and its base model from wherever it says
        raise ArtifactError(
            folder / ADAPTER, "an adapter lies in an artifact: move its files to a folder of their own (attach_adapter)"
        )
    config = _read_config(folder / "config.json")
    read_json(folder / "generation_config.json")  # without it transformers would know no end of an answer
    expected = _expected_shapes(config)
    found: dict[str, Path] = {}
    for file, listed in _weight_files(folder).items():
        for name, shape, dtype in _header(file):
            if name not in expected:
                raise ArtifactError(file, "no parameter of this model has that name", name)
            if name in found:
                raise ArtifactError(file, f"stands in {found[name].name} too", name)
            if shape != expected[name]:
                raise ArtifactError(file, f"shape {shape}, but config.json asks for {expected[name]}", name)
            if dtype not in _FLOATS:
                raise ArtifactError(file, f"dtype {dtype}; allowed are {', '.join(_FLOATS)}", name)
            if listed is not None and name not in listed:
                raise ArtifactError(folder / INDEX, f"is in {file.name}, but the index does not say so", name)
            found[name] = file
        if absent := sorted((listed or set()) - found.keys()):
            raise ArtifactError(file, "the index says that it is in this file, which lacks it", absent[0])
    if absent := sorted(expected.keys() - found.keys()):
        where = folder / (INDEX if len(set(found.values())) > 1 else WEIGHTS)
        raise ArtifactError(where, f"missing, and {len(absent) - 1} more; was the save interrupted?", absent[0])
    return config


def open_artifact(directory: Folder) -> tuple[MQWenConfig, MQWenProcessor]:
    """Configuration and processor of an artifact that has been checked whole, without its weights.

    Raises:
        As `check_artifact`, `check_processor` and `MQWenProcessor.from_components`.
    """
    config = check_artifact(directory)
    processor = MQWenProcessor.from_pretrained(Path(directory))
    check_processor(config, processor)
    return config, processor


def check_processor(config: MQWenConfig, processor: MQWenProcessor) -> None:
    """Whether this processor is the model's: with another one answers would be wrong, and nothing else would show it.

    Raises:
        ConfigurationError: another placeholder, more ids than the model has rows, other pictures.
    """
    if processor.tokenizer.image_token_id != config.image_token_id:
        raise ConfigurationError(
            f"image_token_id is {config.image_token_id} in the model and {processor.tokenizer.image_token_id} in the "
            "tokenizer; use the tokenizer that the model was trained with"
        )
    if processor.tokenizer.vocab_size > config.vocab_size:
        raise ConfigurationError(
            f"the tokenizer has {processor.tokenizer.vocab_size} ids, the model {config.vocab_size} rows"
        )
    if processor.image_size != config.vision_config.image_size:
        raise ConfigurationError(
            f"the processor makes pictures of {processor.image_size} pixels, the model takes "
            f"{config.vision_config.image_size}"
        )
    theirs = [*processor.image_mean, *processor.image_std]
    if any(abs(a - b) > 1e-6 for a, b in zip([*config.image_mean, *config.image_std], theirs, strict=True)):
        raise ConfigurationError("image_mean and image_std differ between model and processor")


def _read_config(path: Path) -> MQWenConfig:
    content = read_json(path)
    if content.get("model_type") != MQWenConfig.model_type:
        raise ArtifactError(
            path,
            f"model_type is {content.get('model_type')!r}, not {MQWenConfig.model_type!r}; published Qwen and CLIP "
            "folders are read by MQWenLMHeadModel.from_components",
        )
    version = content.get("format_version")
    if type(version) is not int or version < 1:
        raise ArtifactError(path, f"format_version is {version!r}; an artifact has 1 to {FORMAT_VERSION}")
    return MQWenConfig.from_dict(content, name_or_path=str(path.parent))


def _expected_shapes(config: MQWenConfig) -> dict[str, tuple[int, ...]]:
    from mqwen.model.network import MQWenLMHeadModel  # it calls check_artifact when it loads

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in MQWenLMHeadModel(config).state_dict().items()}


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files that hold weights, each with the tensors that the index says it holds."""
    if not (folder / INDEX).exists():
        return {folder / WEIGHTS: None}
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ArtifactError(folder / INDEX, "has no weight_map from tensors to files")
    files: dict[Path, set[str] | None] = {}
    for tensor, file in sorted(listed.items(), key=lambda item: str(item[1])):
        if not isinstance(file, str) or Path(file).name != file:
            raise ArtifactError(folder / INDEX, f"{file!r} is no name of a file in this folder", tensor)
        names = files.setdefault(folder / file, set())
        assert names is not None
        names.add(tensor)
    return files


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of each tensor of a file, whose length must be what its header says."""
    try:
        with file.open("rb") as opened:
            if opened.read(4).startswith(_PICKLES):
                raise ArtifactError(
                    file, "is a pickle (torch.save), which can run code; artifacts hold safetensors only: export again"
                )
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                part = tensors.get_slice(name)
                yield name, tuple(part.get_shape()), part.get_dtype()
    except FileNotFoundError:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in file.parent.glob(pattern))
        hint = f"; {pickles[0]} is a pickle, which is not read" if pickles else ""
        raise ArtifactError(file, f"is missing{hint}") from None
    except (SafetensorError, OSError) as error:
        raise ArtifactError(file, f"is cut short or no safetensors file ({error}); copy it again") from None
