"""Made rows: tokens and pixels are random, what a step costs does not depend on them.

Shapes: B rows, T tokens (a picture is one), L positions of a row, N pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mqwen.model import MQWenConfig, MQWenLMHeadModel
from mqwen.model.rows import Expanded


@dataclass(frozen=True)
class Shape:
    """`rows` rows of `length` positions a pass, with a picture for each `picture_every` of them.

    `supervised`: "all" positions, those of pictures too, whose labels are random ids; all that hold "text"; or
    "answers" alone, about 15 %, of conversations of many lengths.
    """

    rows: int
    length: int
    picture_every: int
    supervised: str = "all"


@dataclass(frozen=True)
class Made:
    """A pass, as mqwen.train.loop.Batch wants it; `runs` are the lengths of its conversations."""

    inputs: dict[str, Tensor]
    supervised: int
    positions: int
    images: int
    place: tuple[int, int, int]
    runs: list[int]
    keys: list[str] = field(default_factory=list)
    epochs: float = 0.0


def made_rows(config: MQWenConfig, shape: Shape, pin: bool, different: int = 12) -> Iterator[Made]:
    """Passes without end; `different` of them in turns."""
    made = [_row(config, shape, seed) for seed in range(different)]
    if pin:
        made = [replace(one, inputs={name: x.pin_memory() for name, x in one.inputs.items()}) for one in made]
    for number, row in enumerate(itertools.cycle(made)):
        yield replace(row, place=(0, 0, number))


def _row(config: MQWenConfig, shape: Shape, seed: int) -> Made:
    draw = torch.Generator().manual_seed(seed)
    pictures, places = shape.length // shape.picture_every, config.image_positions
    rows: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "segment_ids": []}
    runs, images = list[int](), 0
    for _ in range(shape.rows):
        free = shape.length - pictures * places
        parts = 1 if shape.supervised != "answers" else pictures
        cuts = (torch.rand(parts - 1, generator=draw) * (free - 8 * parts)).long().sort().values.tolist()
        ends = [cut + 8 * i for i, cut in enumerate([*cuts, free - 8 * parts], start=1)]
        start = 0
        ids, labels, segments = list[Tensor](), list[Tensor](), list[Tensor]()
        for segment, end in enumerate(ends, start=1):
            text = torch.randint(0, min(config.image_token_id, config.vocab_size), (end - start,), generator=draw)
            shown = pictures // parts
            some = torch.full((len(text) + shown,), config.image_token_id)
            where = torch.linspace(0, len(some) - 1, shown + 2).long()[1:-1] if shown else torch.tensor([]).long()
            is_text = torch.ones(len(some), dtype=torch.bool).index_fill(0, where, False)
            some[is_text] = text
            wanted = torch.where(is_text, some, -100)
            if shape.supervised == "answers":
                wanted[: len(wanted) - max(1, round(0.15 * shape.length / parts))] = -100
            ids.append(some)
            labels.append(wanted)
            segments.append(torch.full_like(some, segment))
            runs.append(len(text) + shown * places)
            images += shown
            start = end
        for name, tensors in zip(rows, (ids, labels, segments), strict=True):
            rows[name].append(torch.cat(tensors))
    inputs = {name: torch.stack(tensors) for name, tensors in rows.items()}
    size = config.vision_config.image_size
    inputs["pixel_values"] = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=draw)
    positions = shape.rows * shape.length
    assert sum(runs) == positions
    counted = int((inputs["labels"] != -100).sum()) - len(runs)
    supervised = positions - len(runs) if shape.supervised == "all" else counted
    return Made(inputs, supervised, positions, images, (0, 0, 0), runs)


def supervise_all(model: MQWenLMHeadModel) -> None:
    """From now on each position predicts the next one, also where that is a picture's: the most that a row can cost."""
    expand = model.transformer.expand

    def everywhere(*arguments: Any, **named: Any) -> Expanded:
        rows = expand(*arguments, **named)
        count = rows.ids.numel()
        places = torch.arange(count - 1, device=rows.ids.device)
        asked = places[(places + 1) % rows.ids.shape[1] != 0]
        return replace(rows, labels=rows.ids, asked=asked)

    model.transformer.expand = everywhere  # type: ignore[method-assign]
