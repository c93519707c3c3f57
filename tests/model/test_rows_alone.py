"""300 random batches: padding, packing, pictures, chunks and cache never change what a row computes alone."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mqwen.model import MQWenCache
from tests.model.small import (
    PICTURE,
    POSITIONS,
    expanded_length,
    random_conversation,
    random_features,
    small_model,
)

ATOL = 1e-4  # logits reach 10 here
BATCHES = 100  # of each of the three kinds


@dataclass
class Alone:
    """One conversation, computed by itself: one row, no mask, no cache."""

    ids: list[int]
    images: Tensor | None
    logits: Tensor  # (expanded length, vocabulary)

    @classmethod
    def of(cls, ids: list[int], seed: int) -> Alone:
        images = random_features(ids.count(PICTURE), seed)
        return cls(ids, images, small_model()(torch.tensor([ids]), images=images).logits[0])


def together(rows: list[Alone]) -> Tensor | None:
    images = [row.images for row in rows if row.images is not None]
    return torch.cat(images) if images else None


def grown(values: list[int], ids: list[int]) -> list[int]:
    """Values of ids after expansion, each picture's repeated: the plainest way to say it."""
    return [
        value for value, token in zip(values, ids, strict=True) for _ in range(POSITIONS if token == PICTURE else 1)
    ]


@torch.no_grad()
@pytest.mark.parametrize("seed", range(BATCHES))
def test_padded_rows(seed: int) -> None:
    """Padding on either side, mask as long as the ids or expanded; then decoding from the cache, row by row alike."""
    draw = random.Random(seed)
    model = small_model()
    rows = [Alone.of(random_conversation(draw), seed * 10 + i) for i in range(draw.randint(1, 4))]
    side = draw.choice(["left", "right"])
    width = max(len(row.ids) for row in rows) + draw.choice([0, 0, 3])
    padding = [[draw.choice([0, PICTURE])] * (width - len(row.ids)) for row in rows]  # what stands there is no picture
    ids = [pad + row.ids if side == "left" else row.ids + pad for row, pad in zip(rows, padding, strict=True)]
    mask = [[0] * len(p) + [1] * len(r.ids) for r, p in zip(rows, padding, strict=True)]
    mask = mask if side == "left" else [row[::-1] for row in mask]
    if draw.random() < 0.3:  # expanded: then a placeholder that stands in the padding cannot be told from a picture
        ids = [[0 if not m else t for t, m in zip(row, keep, strict=True)] for row, keep in zip(ids, mask, strict=True)]
        wide = [grown(keep, row) for row, keep in zip(ids, mask, strict=True)]
        most = max(map(len, wide))
        mask = [[0] * (most - len(m)) + m if side == "left" else m + [0] * (most - len(m)) for m in wide]
    out = model(
        torch.tensor(ids),
        images=together(rows),
        attention_mask=torch.tensor(mask),
        padding_side=side,
        use_cache=True,
    )
    for row, logits in zip(rows, out.logits, strict=True):
        length = expanded_length(row.ids)
        assert_close(logits[-length:] if side == "left" else logits[:length], row.logits)

    cache = out.past_key_values
    singles = [model(torch.tensor([row.ids]), images=row.images, use_cache=True).past_key_values for row in rows]
    order = draw.sample(range(len(rows)), len(rows))
    cache.reorder_cache(torch.tensor(order))
    for _ in range(2):
        tokens = torch.tensor([[draw.randrange(PICTURE)] for _ in rows])
        steps = model(tokens, past_key_values=cache).logits
        for place, index in enumerate(order):
            alone = model(tokens[place : place + 1], past_key_values=singles[index]).logits
            assert_close(steps[place], alone[0])


@torch.no_grad()
@pytest.mark.parametrize("seed", range(BATCHES))
def test_packed_rows(seed: int) -> None:
    """Several conversations a row, with and without room at the end; labels, loss and segment ids in both lengths."""
    draw = random.Random(1000 + seed)
    model = small_model()
    packs = [
        [Alone.of(random_conversation(draw), seed * 100 + 10 * p + i) for i in range(draw.randint(1, 4))]
        for p in range(draw.randint(1, 3))
    ]
    flat = [row for pack in packs for row in pack]
    ids = [[token for row in pack for token in row.ids] for pack in packs]
    segments = [[number for number, row in enumerate(pack, 1) for _ in row.ids] for pack in packs]
    labels = [[draw.choice([-100, token]) if token != PICTURE else -100 for token in row] for row in ids]
    as_given: dict[str, Any] = {}
    wide = [grown(row, tokens) for row, tokens in zip(segments, ids, strict=True)]
    needed = max(map(len, wide))
    expand_segments, expand_labels = draw.random() < 0.3, draw.random() < 0.5
    if expand_segments:  # then the ids' own padding is not known: all rows need one length of ids
        ids, segments, labels, packs = ids[:1], segments[:1], labels[:1], packs[:1]
        wide, flat = wide[:1], packs[0]
        needed = len(wide[0])
    width = max(map(len, ids))
    expand_labels &= needed != width  # as long as the ids would count as not expanded
    as_given["segment_ids"] = padded(wide if expand_segments else segments, needed if expand_segments else width, 0)
    wide_labels = [
        [-100 if t == PICTURE else v for v, t in zip(grown(row, tokens), grown(tokens, tokens), strict=True)]
        for row, tokens in zip(labels, ids, strict=True)
    ]
    as_given["labels"] = padded(wide_labels if expand_labels else labels, needed if expand_labels else width, -100)
    out = model(padded(ids, width, 0), images=together(flat), **as_given)

    total, count = torch.zeros(()), 0
    for pack, row_labels, row_logits in zip(packs, labels, out.logits, strict=True):
        start = begin = 0
        for row in pack:
            length = expanded_length(row.ids)
            assert_close(row_logits[start : start + length], row.logits)
            targets = torch.tensor(grown(row_labels[begin : begin + len(row.ids)], row.ids))[1:]
            total += torch.nn.functional.cross_entropy(row.logits[:-1], targets, reduction="sum")
            count += int((targets != -100).sum())
            start, begin = start + length, begin + len(row.ids)
    assert abs(out.loss - total / max(count, 1)) <= ATOL
    kept = model(
        padded(ids, width, 0), images=together(flat), logits_to_keep="labels", num_items_in_batch=7, **as_given
    )
    assert kept.logits is None
    assert abs(kept.loss - total / 7) <= ATOL * max(count, 1)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(BATCHES))
def test_chunks_on_a_cache(seed: int) -> None:
    """A prompt fed in chunks equals one prefill, also where chunks see padding and pictures, and beyond seq_length,
    where the cache is told the prompt's length beforehand."""
    draw = random.Random(2000 + seed)
    model = small_model()
    rows = [Alone.of(random_conversation(draw), seed * 10 + i) for i in range(draw.randint(1, 3))]
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[0] * (width - len(row.ids)) + row.ids for row in rows])
    mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows])
    cuts = sorted({0, width, *(draw.randrange(1, width + 1) for _ in range(draw.randint(0, 3)))})
    whole_mask = draw.choice([True, False])  # as generate grows it, or of the chunk alone
    features = [list(row.images) if row.images is not None else [] for row in rows]
    lengths = torch.tensor([expanded_length(row.ids) for row in rows])
    cache = MQWenCache(prompt_lengths=lengths)
    seen: list[list[Tensor]] = [[] for _ in rows]
    for start, stop in itertools.pairwise(cuts):
        chunk = ids[:, start:stop]
        images = [features[i].pop(0) for i, row in enumerate(chunk) for _ in range(int((row == PICTURE).sum()))]
        out = model(
            chunk,
            images=torch.stack(images) if images else None,
            attention_mask=mask[:, :stop] if whole_mask else mask[:, start:stop],
            past_key_values=cache,
            padding_side="left",
        )
        for i, row in enumerate(chunk):
            length = expanded_length(row[mask[i, start:stop] > 0].tolist())
            seen[i].append(out.logits[i, out.logits.shape[1] - length :])
    for row, parts in zip(rows, seen, strict=True):
        assert_close(torch.cat(parts), row.logits)
    assert torch.equal(cache.lengths, lengths)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(20))
def test_masked_positions_inside_of_a_row(seed: int) -> None:
    """A mask with holes: the row equals what is left of it, and goes on so from the cache."""
    draw = random.Random(3000 + seed)
    model = small_model()
    width = draw.randint(5, 30)
    ids = [[draw.choice([PICTURE, *range(PICTURE)]) for _ in range(width)] for _ in range(3)]
    mask = [[draw.choice([0, 1, 1]) for _ in row] for row in ids]
    kept = [[t for t, m in zip(row, keep, strict=True) if m] or [row[0]] for row, keep in zip(ids, mask, strict=True)]
    mask = [keep if any(keep) else [1] + [0] * (width - 1) for keep in mask]
    rows = [Alone.of(row, seed * 10 + i) for i, row in enumerate(kept)]
    out = model(torch.tensor(ids), images=together(rows), attention_mask=torch.tensor(mask), use_cache=True)
    token = torch.tensor([[1]])
    steps = model(token.expand(3, 1), past_key_values=out.past_key_values).logits
    for i, row in enumerate(rows):
        widths = [POSITIONS if m and t == PICTURE else 1 for m, t in zip(mask[i], ids[i], strict=True)]
        where = torch.tensor([m for m, w in zip(mask[i], widths, strict=True) for _ in range(w)]).nonzero().flatten()
        assert_close(out.logits[i, where], row.logits)
        cache = model(torch.tensor([row.ids]), images=row.images, use_cache=True).past_key_values
        assert_close(steps[i], model(token, past_key_values=cache).logits[0])


def assert_close(ours: Tensor, alone: Tensor) -> None:
    assert ours.shape == alone.shape
    assert (ours - alone).abs().max() <= ATOL


def padded(rows: list[list[int]], width: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])
