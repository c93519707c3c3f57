"""The model that a run starts from: its weights, its adapter, and what of it is frozen."""

from __future__ import annotations

from dataclasses import asdict

import torch

from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor, MQWenTokenizer
from mqwen.model.artifact import open_artifact
from mqwen.model.vocabulary import VOCABULARY_FILE
from mqwen.storage import Location, local_folder, locate, readable
from mqwen.train.optimizer import freeze, parameter_groups
from mqwen.train.settings import RunSettings, SettingsError

EMBEDDING_MULTIPLE = 64  # rows of the embedding are rounded up to it, as matrix units like them


def starting_point(settings: RunSettings) -> tuple[MQWenConfig, MQWenProcessor]:
    """Configuration and processor, from `model.init_from` or for fresh weights; SettingsError says what is missing."""
    if settings.model.init_from:
        return open_artifact(local_folder(readable(settings.model.init_from)))
    if not settings.tokenizer:
        raise SettingsError("--tokenizer is missing: fresh weights need the folder of a qwen.tiktoken")
    folder = local_folder(readable(settings.tokenizer), without="*.safetensors", needs=VOCABULARY_FILE)
    tokenizer = MQWenTokenizer.from_pretrained(folder)
    rows = -(-tokenizer.vocab_size // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE
    config = MQWenConfig(**settings.model.config, vocab_size=rows, image_token_id=tokenizer.image_token_id)
    return config, MQWenProcessor(tokenizer, image_size=config.vision_config.image_size)


def outline(settings: RunSettings, config: MQWenConfig, device: str = "meta") -> MQWenLMHeadModel:
    """The model with its adapter and what is frozen, without weights, and on "meta" without memory.

    Raises SettingsError or AdapterError for patterns and targets that match nothing, and for a context that holds no
    picture, before any worker starts.
    """
    if settings.data.pack_length <= config.image_positions:
        raise SettingsError(
            f"--data.pack-length is {settings.data.pack_length}, but one picture alone takes {config.image_positions} "
            f"positions; give it room, as --data.pack-length {8 * config.image_positions}"
        )
    with torch.device(device):
        model = _prepared(MQWenLMHeadModel(config), settings)
    parameter_groups(model, settings.optimizer)
    return model


def build_model(settings: RunSettings, config: MQWenConfig, source: Location | None = None) -> MQWenLMHeadModel:
    """The model as step 1 finds it, the same on every rank.

    `source` is the place of `model.init_from`, for processes whose environment does not say how to reach it.
    """
    torch.manual_seed(settings.seed)
    if settings.model.init_from:
        # In float32 whatever the artifact's dtype: small updates would be lost in fewer bits.
        folder = local_folder(source or locate(settings.model.init_from))
        model = MQWenLMHeadModel.from_pretrained(folder, dtype=torch.float32)
    else:
        model = MQWenLMHeadModel(config)
    return _prepared(model, settings)


def _prepared(model: MQWenLMHeadModel, settings: RunSettings) -> MQWenLMHeadModel:
    if settings.model.lora.r:
        from mqwen.model.adapters import add_adapter  # brings peft, whose import other runs need not wait for

        torch.manual_seed(settings.seed)  # whatever reading the weights drew
        add_adapter(model, **asdict(settings.model.lora))
    freeze(model, settings.optimizer.freeze)
    return model
