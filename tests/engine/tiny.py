"""A whole artifact with random weights, as wide as the demo's: what engine and service do does not rest on training."""

import io
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image

from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor, MQWenTokenizer
from mqwen.model.vocabulary import train_vocabulary

TEXTS = (
    "Which digit is in the picture? How many digits are there? The sum of the digits is eleven.",
    "图片里是哪个数字？一共有几个数字？最左边的数字是三，总和是十一。",
)


def build_artifact(directory: Path, *, layers: int = 4, seq_length: int = 512) -> Path:
    """Writes config, weights, vocabulary and preprocessing; 36 positions a picture."""
    directory.mkdir(parents=True, exist_ok=True)
    train_vocabulary(TEXTS, 320, directory / "qwen.tiktoken")
    tokenizer = MQWenTokenizer(directory / "qwen.tiktoken")
    config = MQWenConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        kv_channels=32,
        intermediate_size=512,
        seq_length=seq_length,
        initializer_range=0.2,  # wide, so that the likeliest tokens differ from prompt to prompt
        image_token_id=tokenizer.image_token_id,
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "image_size": 48,
            "patch_size": 8,
        },
    )
    torch.manual_seed(0)
    model = MQWenLMHeadModel(config).eval()
    with torch.no_grad():  # projected pictures as large as embeddings, so that answers depend on them
        for parameter in model.feature_proj.parameters():
            parameter.mul_(20)
    model.save_pretrained(directory)
    MQWenProcessor(tokenizer, image_size=48).save_pretrained(directory)
    return directory


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """A PNG of coloured boxes."""
    random = Random(seed)
    image = Image.new("RGB", size, tuple(random.choices(range(256), k=3)))
    for _ in range(4):
        left, top = random.randrange(size[0]), random.randrange(size[1])
        box = (left, top, left + random.randrange(8, 32), top + random.randrange(8, 32))
        image.paste(tuple(random.choices(range(256), k=3)), box)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def generate_alone(
    model: MQWenLMHeadModel, processor: MQWenProcessor, ids: Sequence[int], pictures: Sequence[Any], max_tokens: int
) -> tuple[list[int], bool]:
    """Greedy tokens from transformers' generate, one request by itself, up to the first tie; and whether there is one.

    A tie is a step whose two largest logits are closer than 1e-4: there, and after it, company may change the choice.
    """
    pixels = [torch.from_numpy(processor.normalize(processor.pixels(one))) for one in pictures]
    prompt = torch.tensor([list(ids)])
    with torch.inference_mode():
        out = model.generate(
            input_ids=prompt,
            pixel_values=torch.stack(pixels) if pixels else None,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_tokens,
            do_sample=False,
            suppress_tokens=[model.config.image_token_id],
            eos_token_id=processor.tokenizer.stop_ids,
            pad_token_id=processor.tokenizer.eod_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
    best = torch.cat(out.scores).topk(2).values
    ties = ((best[:, 0] - best[:, 1]) < 1e-4).nonzero().flatten().tolist()
    tokens = out.sequences[0, len(prompt[0]) :].tolist()
    return (tokens[: ties[0]], True) if ties else (tokens, False)
