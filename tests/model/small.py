"""A model small enough for hundreds of random batches, whose seq_length is short enough to be crossed by most."""

from __future__ import annotations

import random
from functools import cache

import torch

from mqwen.model import MQWenConfig, MQWenLMHeadModel

PICTURE = 60  # the placeholder
POSITIONS = 4  # of a picture
SEQ_LENGTH = 24
VOCABULARY = 64


@cache
def small_model() -> MQWenLMHeadModel:
    """Two layers, random weights of unit gain (so that what is seen matters), eval mode, float32."""
    config = MQWenConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        kv_channels=16,
        intermediate_size=96,
        seq_length=SEQ_LENGTH,
        image_token_id=PICTURE,
        initializer_range=0.2,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
    )
    torch.manual_seed(0)
    model = MQWenLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.feature_proj.parameters():
            parameter.normal_(std=0.3)
    return model


def random_conversation(draw: random.Random, longest: int = 30, pictures: int = 3) -> list[int]:
    """Ids with up to so many placeholders at random places, two in a row and the ends included."""
    ids = [draw.randrange(PICTURE) for _ in range(draw.randint(1, longest))]
    for _ in range(draw.choice([0, 0, *range(pictures + 1)])):
        ids.insert(draw.randrange(len(ids) + 1), PICTURE)
    return ids


def expanded_length(ids: list[int]) -> int:
    return len(ids) + ids.count(PICTURE) * (POSITIONS - 1)


def random_features(count: int, seed: int) -> torch.Tensor | None:
    """Features of so many pictures, (count, POSITIONS, 32), or None for none."""
    if count == 0:
        return None
    return torch.randn(count, POSITIONS, 32, generator=torch.Generator().manual_seed(seed))
