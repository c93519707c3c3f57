"""The model that a run starts from."""

from __future__ import annotations

import torch

from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor, MQWenTokenizer
from mqwen.model.artifact import check_artifact
from mqwen.model.vocabulary import VOCABULARY_FILE
from mqwen.storage import local_folder, locate, readable
from mqwen.train.settings import RunSettings, SettingsError

EMBEDDING_MULTIPLE = 64  # rows of the embedding are rounded up to it, as matrix units like them


def starting_point(settings: RunSettings) -> tuple[MQWenConfig, MQWenProcessor]:
    """Configuration and processor, from `model.init_from` or for fresh weights; SettingsError says what is missing."""
    if settings.model.init_from:
        artifact = local_folder(readable(settings.model.init_from))
        return check_artifact(artifact), MQWenProcessor.from_pretrained(artifact)
    if not settings.tokenizer:
        raise SettingsError("--tokenizer is missing: fresh weights need the folder of a qwen.tiktoken")
    folder = local_folder(readable(settings.tokenizer), without="*.safetensors")
    if not (folder / VOCABULARY_FILE).is_file():  # else transformers would look for it on the Hub
        raise SettingsError(
            f"--tokenizer {settings.tokenizer} holds no {VOCABULARY_FILE}; give an artifact, or a folder with that file"
        )
    tokenizer = MQWenTokenizer.from_pretrained(folder)
    rows = -(-tokenizer.vocab_size // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE
    config = MQWenConfig(**settings.model.config, vocab_size=rows, image_token_id=tokenizer.image_token_id)
    return config, MQWenProcessor(tokenizer, image_size=config.vision_config.image_size)


def build_model(settings: RunSettings, config: MQWenConfig) -> MQWenLMHeadModel:
    """The weights that step 1 starts from, the same on every rank."""
    torch.manual_seed(settings.seed)
    if settings.model.init_from:
        return MQWenLMHeadModel.from_pretrained(local_folder(locate(settings.model.init_from)))
    return MQWenLMHeadModel(config)
