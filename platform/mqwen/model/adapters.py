"""LoRA adapters (Hu et al., 2021): PEFT's current folders, and those that the reference wrote."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from mqwen.model.components import read_pickle, read_safetensors
from mqwen.model.errors import AdapterError
from mqwen.model.files import Folder, read_json

PREFIX = "base_model.model."
PROJECTOR = "feature_proj"


def add_adapter(
    model: nn.Module, *, r: int, alpha: float, dropout: float, targets: Sequence[str], modules_to_save: Sequence[str]
) -> PeftModel:
    """Wrap the model with a fresh adapter that adds nothing yet (B is zero), trainable; all else is frozen.

    Args:
        model: its layers are replaced in place, so that it can be used as before, without the wrapper.
        r, alpha, dropout: of rank r, scaled by alpha / r; its input loses a share `dropout` in training.
        targets: last parts of the names of linear layers.
        modules_to_save: modules that are trained whole beside it, in a copy, and saved with it.

    Raises:
        AdapterError: a name that matches nothing.
    """
    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    modules = {name for name, _ in model.named_children()}
    for kind, names, known in (("target", targets, layers), ("module to save", modules_to_save, modules)):
        if unknown := [name for name in names if name not in known]:
            listed = ", ".join(sorted(name for name in known if not name.isdigit()))
            raise AdapterError(f"LoRA {kind} {unknown[0]!r} is in no name of this model; there are {listed}")
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        modules_to_save=list(modules_to_save) or None,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    config.base_model_name_or_path = None  # a path on this machine
    return wrapped


def attach_adapter(model: nn.Module, folder: Folder, *, trainable: bool = False) -> PeftModel:
    """Wrap the model with an adapter, unmerged. PEFT's `merge_adapter` and `unmerge_adapter` add it to the weights and
    take it out again, `merge_and_unload` gives the plain model back.

    Args:
        model: an MQWenLMHeadModel. Its layers are replaced in place, and its projector's weights where the adapter
            brings a projector.
        folder: adapter_config.json with adapter_model.safetensors (PEFT); or with adapter_model.bin, and
            other_params.bin for the projector, as the reference wrote them: read with torch's weights-only loading,
            which runs no code of theirs, and never looked for unless the folder is named here.
        trainable: leave the adapter's own parameters trainable; everything else is frozen.

    Raises:
        AdapterError: no LoRA adapter, a file that is missing or unreadable, or one made for other modules or shapes.
        CheckpointError: a file that is truncated, or a pickle of more than tensors.
    """
    folder = Path(folder)
    config = _read_config(folder)
    weights = _read_tensors(folder, "adapter_model")
    if weights is None:
        raise AdapterError(f"{folder} has neither adapter_model.safetensors nor adapter_model.bin")
    _check(folder, model, weights, config.modules_to_save or [])
    projector = _read_tensors(folder, "other_params")
    if projector is not None:
        _load_projector(folder, model, projector)

    config.inference_mode = not trainable
    config.base_model_name_or_path = None  # a path on the machine that trained it
    wrapped = get_peft_model(model, config)
    problems = set_peft_model_state_dict(wrapped, weights)
    missing = [name for name in problems.missing_keys if "lora_" in name]
    if missing or problems.unexpected_keys:
        first = (missing or problems.unexpected_keys)[0]
        raise AdapterError(
            f"{folder}: target_modules {sorted(config.target_modules)} and the weights do not agree, first at {first}"
        )
    return wrapped.train(model.training)


def merge_adapter(model: nn.Module, folder: Folder) -> None:
    """Add an adapter to the model's weights for good, in place: W + (alpha / r) B A. Names stay the published ones.

    Raises:
        AdapterError: see `attach_adapter`.
    """
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    attach_adapter(model, folder).merge_and_unload()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)  # PEFT froze all of them


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter apart from its model. layers: by the layer's name, A (r, in) and (alpha / r) B (out, r).

    projector: the adapter's own, where it brings one.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    projector: nn.Module | None

    @property
    def changes_tower(self) -> bool:
        return any(not name.startswith("transformer.") and name != "lm_head" for name in self.layers)


def read_adapter(model: nn.Module, folder: Folder) -> AdapterWeights:
    """An adapter's weights, on the model's device and in its dtype; the model stays as it is.

    Raises:
        AdapterError: see `attach_adapter`; or it holds more than LoRA layers and a projector.
    """
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = model.get_submodule(PROJECTOR)
    projector = deepcopy(own)  # what the adapter brings goes into this one
    setattr(model, PROJECTOR, projector)
    brought = (Path(folder) / "other_params.bin").exists() or (Path(folder) / "other_params.safetensors").exists()
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    wrapped = None
    try:
        wrapped = attach_adapter(model, folder)
        for name, module in model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                if name != PROJECTOR:
                    raise AdapterError(f"{folder} brings a whole {name}; beside LoRA only {PROJECTOR} can be served")
                projector, brought = module.modules_to_save["default"], True
            elif isinstance(module, LoraLayer):
                if module.use_dora["default"]:
                    raise AdapterError(f"{folder} is a DoRA adapter; only plain LoRA is served")
                weight = module.get_base_layer().weight
                down, up = (part["default"].weight.detach().to(weight) for part in (module.lora_A, module.lora_B))
                layers[name] = down, up * module.scaling["default"]
    finally:
        if wrapped is not None:
            wrapped.unload()
        setattr(model, PROJECTOR, own)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)  # PEFT froze all of them
    projector = projector.to(next(own.parameters()).dtype).requires_grad_(False)
    return AdapterWeights(layers, projector if brought else None)


def _read_config(folder: Path) -> LoraConfig:
    fields = read_json(folder / "adapter_config.json")
    if fields.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} is a {fields.get('peft_type')} adapter; only LORA is served")
    known = LoraConfig.__dataclass_fields__
    # What PEFT added and dropped over the years is left out; what changes the computation is named in both.
    config = LoraConfig(**{name: value for name, value in fields.items() if name in known and name != "auto_mapping"})
    if not config.target_modules or isinstance(config.target_modules, str):
        raise AdapterError(f"{folder}: target_modules must be a list of module names, not {config.target_modules!r}")
    if config.bias != "none":
        raise AdapterError(f"{folder}: bias is {config.bias!r}, which changes the model's own; only 'none' is read")
    return config


def _read_tensors(folder: Path, stem: str) -> dict[str, Tensor] | None:
    safe, unsafe = folder / f"{stem}.safetensors", folder / f"{stem}.bin"
    if safe.exists():
        return dict(read_safetensors(safe))
    if not unsafe.exists():
        return None
    return read_pickle(unsafe)


def _check(folder: Path, model: nn.Module, weights: dict[str, Tensor], whole: Sequence[str]) -> None:
    """Each LoRA matrix must belong to a linear layer that the model has, and fit it. whole: PEFT's modules_to_save, of
    which it keeps copies; any other parameter would be written into the model itself."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for key, tensor in weights.items():
        name, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX) or not name:
            own = key.removeprefix(PREFIX)
            if own in parameters and any(f".{module}." in f".{own}" for module in whole):
                continue
            raise AdapterError(f"{folder}: {key} is no LoRA weight, and of no module that modules_to_save names")
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise AdapterError(f"{folder}: {key} is for a linear layer {name!r}, which this model does not have")
        expected = layer.in_features if part.startswith("A") else layer.out_features
        given = tensor.shape[1] if part.startswith("A") else tensor.shape[0]
        if given != expected:
            raise AdapterError(f"{folder}: {key} is {tuple(tensor.shape)}, but {name} has {expected} channels there")


def _load_projector(folder: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    projector = model.get_submodule(PROJECTOR)
    expected = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if given != expected:
        raise AdapterError(f"{folder}: its other_params are {given}, the projector is {expected}")
    projector.load_state_dict(tensors)
