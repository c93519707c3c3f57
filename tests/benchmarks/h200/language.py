"""Rows that can be learnt: words follow one another by a grammar, of which there are several, and a picture before the
words shows which one holds.

Shapes: B rows, T tokens (a picture is one), S sentences, W words.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mqwen.model import MQWenConfig
from tests.benchmarks.h200.rows import Made, Shape

CHANCES = torch.tensor([0.5, 0.25, 0.15, 0.1])  # of a word's followers: their entropy is 1.21 nats


@dataclass(frozen=True)
class Language:
    """followers: (grammars, words, 4), which words may follow one, the likeliest first. pictures: (grammars, 3, H, W),
    uint8, a noisy field of one colour each."""

    followers: Tensor
    pictures: Tensor

    @classmethod
    def made(cls, config: MQWenConfig, words: int, grammars: int = 4) -> Language:
        draw = torch.Generator().manual_seed(1)
        followers = torch.randint(0, words, (grammars, words, len(CHANCES)), generator=draw)
        side = config.vision_config.image_size
        colours = torch.randint(0, 200, (grammars, 3, 1, 1), generator=draw)
        noise = torch.randint(0, 56, (grammars, 3, side, side), generator=draw)
        return cls(followers, (colours + noise).to(torch.uint8))

    def sentences(self, grammars: Tensor, length: int, draw: torch.Generator) -> Tensor:
        """(S, length) words; grammars (S,) holds each one's."""
        said = [torch.randint(0, self.followers.shape[1], grammars.shape, generator=draw)]
        chosen = torch.multinomial(CHANCES, length * len(grammars), replacement=True, generator=draw)
        for choice in chosen.view(length, -1)[1:]:
            said.append(self.followers[grammars, said[-1], choice])
        return torch.stack(said, 1)


def language_rows(config: MQWenConfig, shape: Shape, words: int, pin: bool, steps: int) -> Iterator[Made]:
    """Passes without end; so many different ones. Each `picture_every` places are a picture and a sentence, which sees
    nothing of the others; all of its words are supervised."""
    language = Language.made(config, words)
    made = [_row(language, config, shape, seed, pin) for seed in range(steps)]
    return itertools.cycle(made)


def _row(language: Language, config: MQWenConfig, shape: Shape, seed: int, pin: bool) -> Made:
    draw = torch.Generator().manual_seed(1000 + seed)
    per_row = shape.length // shape.picture_every
    grammars = torch.randint(0, len(language.pictures), (shape.rows * per_row,), generator=draw)
    text = language.sentences(grammars, shape.picture_every - config.image_positions, draw)
    picture = torch.full((len(text), 1), config.image_token_id)
    ids = torch.cat((picture, text), 1).view(shape.rows, -1)
    labels = torch.cat((torch.full_like(picture, -100), text), 1).view(shape.rows, -1)
    segments = torch.arange(1, per_row + 1).repeat_interleave(ids.shape[1] // per_row).expand(shape.rows, -1)
    inputs = {
        "input_ids": ids,
        "labels": labels,
        "segment_ids": segments.contiguous(),
        "pixel_values": language.pictures[grammars],
    }
    if pin:
        inputs = {name: x.pin_memory() for name, x in inputs.items()}
    runs = [shape.picture_every] * len(text)
    return Made(inputs, text.numel(), sum(runs), len(text), (0, 0, seed), runs)
