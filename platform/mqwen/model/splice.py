"""Where pictures enter a row: one routine expands ids, labels, masks and segment ids, for training and for serving.

A placeholder in the ids stands for one picture and becomes `image_positions` positions. Everything here is integers;
the picture features are put into the embeddings at `Expanded.slots` later.

Shapes: B rows, T ids of a row as given, L positions of a row after expansion, P positions of a picture, N pictures.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mqwen.model.errors import LengthError, PictureCountError, SegmentError, TokenRangeError
from mqwen.model.rows import IGNORE, Expanded, Layout, run_starts

PaddingSide = Literal["left", "right"]


def expand(
    input_ids: Tensor,
    pictures: int,
    *,
    image_token_id: int,
    image_positions: int,
    vocab_size: int,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    padding_side: PaddingSide = "right",
    row_length: int = 0,
) -> Expanded:
    """Replace each placeholder by `image_positions` positions.

    Labels, mask and segment ids may each be as long as input_ids (they are expanded here) or as long as the result
    (they are taken as they are); what is as long as input_ids always counts as not expanded. Rows with fewer pictures
    come out shorter and are padded on `padding_side`; where mask or segment ids, as long as input_ids, show padding
    that no row needs after expansion, it is cut off, unless something came in the full length.
    Rows come out at least `row_length` long: with a length of their own all batches are of one shape.
    The host reads from input_ids' device once, so ids on the CPU cost an accelerator no wait.

    Args:
        input_ids: (B, T), integers in 0..vocab_size - 1.
        pictures: N, how many pictures were given for all rows together.
        labels: (B, T) or (B, L), integers; -100 is ignored.
        attention_mask: (B, T) or (B, L); 0 is padding, everything else a token.
        segment_ids: (B, T) or (B, L), integers; 0 is padding, else the conversation's number, each conversation one
            run, numbers rising along the row. One conversation cannot see another.

    Raises:
        PictureCountError: placeholders and pictures differ in number.
        TokenRangeError: an id outside of the vocabulary.
        LengthError: labels, mask or segment ids of neither length.
        SegmentError: a conversation in pieces, or numbers that do not rise.
    """
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise LengthError(f"input_ids must be (rows, positions) with at least one of each, not {_shape(input_ids)}")
    ids = input_ids.long()
    rows, width = ids.shape
    device = ids.device
    filled = _filled(ids, attention_mask, segment_ids)
    is_picture = ids == image_token_id
    if filled is not None and filled.shape[1] == width:
        is_picture = is_picture & (filled > 0)

    # Per row: the place after expansion of each id, where the row ends, and how many places its tokens need.
    widths = torch.where(is_picture, image_positions, 1)
    stops = widths.cumsum(1)
    starts, ends = stops - widths, stops[:, -1:]
    needed = ends
    if filled is not None and filled.shape[1] == width:
        needed = _needed(starts, stops, filled > 0, padding_side)

    counts, needs, extremes, layout = _read(ids, labels, is_picture, needed, filled, segment_ids)
    for value, name in zip(extremes, ("token id", "token id", "label", "label"), strict=True):
        if not 0 <= value < vocab_size:
            raise TokenRangeError(f"{name} {value} lies outside of the vocabulary, 0..{vocab_size - 1}")
    if sum(counts) != pictures:
        raise PictureCountError(sum(counts), pictures)

    growth = [count * (image_positions - 1) for count in counts]
    given = {"labels": labels, "attention_mask": attention_mask, "segment_ids": segment_ids}
    length = _length(given, rows, width, width + max(growth), width if not pictures else max(needs))
    length = max(length, row_length)
    if pictures == 0 and length == width:
        slots = torch.empty(0, dtype=torch.long, device=device)
        return _finish(ids, labels, filled, slots, layout, width)

    if padding_side == "left":
        starts, ends = starts + (length - ends), torch.full_like(ends, length)
    cut = (starts < 0).sum(1, keepdim=True)  # leading padding that did not fit
    bins = torch.where((starts >= 0) & (starts < length), starts, length)
    marks = torch.zeros(rows, length + 1, dtype=torch.long, device=device).scatter_(1, bins, 1)[:, :length]
    source = (marks.cumsum(1) - 1 + cut).clamp(min=0)  # the id that each place comes from
    places = torch.arange(length, device=device)
    inside = (places >= starts[:, :1]) & (places < ends)

    def widen(tensor: Tensor, fill: int) -> Tensor:
        tensor = tensor.to(device).long()
        return tensor if tensor.shape[1] != width else tensor.gather(1, source).masked_fill(~inside, fill)

    if filled is not None:
        filled = widen(filled, 0)
    if min(growth) != max(growth) or length > width + max(growth):
        filled = inside.long() if filled is None else filled * inside
        if layout in (Layout.FULL, Layout.PREFIX):
            layout = Layout.PREFIX if padding_side == "right" else Layout.RUNS

    # The pictures' places in their order: each placeholder scatters its place to its rank, all other ids to a bin.
    rank = is_picture.flatten().cumsum(0) - 1
    flat_starts = (starts + length * torch.arange(rows, device=device).unsqueeze(1)).flatten()
    bins = torch.where(is_picture.flatten(), rank, pictures)
    firsts = torch.zeros(pictures + 1, dtype=torch.long, device=device).scatter_(0, bins, flat_starts)[:pictures]
    slots = (firsts.unsqueeze(1) + torch.arange(image_positions, device=device)).flatten()

    labels = None if labels is None else widen(labels, IGNORE)
    return _finish(widen(ids, 0), labels, filled, slots, layout, width)


def _filled(ids: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor | None:
    """Mask and segment ids as one tensor: 0 padding, else the conversation."""
    for name, given in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if given is not None and (given.dim() != 2 or given.shape[0] != ids.shape[0]):
            raise LengthError(f"{name} must be ({ids.shape[0]}, positions), not {_shape(given)}")
    mask = None if attention_mask is None else (attention_mask != 0).to(ids.device).long()
    segments = None if segment_ids is None else segment_ids.to(ids.device).long()
    if mask is None or segments is None:
        return mask if segments is None else segments
    if mask.shape != segments.shape:
        raise LengthError(
            f"attention_mask {_shape(mask)} and segment_ids {_shape(segments)} differ; segment_ids alone say it all, "
            "with 0 for padding"
        )
    return segments * mask


def _needed(starts: Tensor, stops: Tensor, tokens: Tensor, side: PaddingSide) -> Tensor:
    """Places that each row needs from its first place (right padding) or to its last (left), (B, 1)."""
    if side == "right":
        return torch.where(tokens, stops, 0).amax(1, keepdim=True)
    ends = stops[:, -1:]
    return ends - torch.where(tokens, starts, ends).amin(1, keepdim=True)


def _read(
    ids: Tensor,
    labels: Tensor | None,
    is_picture: Tensor,
    needed: Tensor,
    filled: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[list[int], list[int], list[int], Layout]:
    """Pictures and places of each row, smallest and largest id and label, and the layout, by one read."""
    wanted = ids if labels is None or labels.numel() == 0 else labels.to(ids.device).long()
    extremes = [*ids.aminmax(), *wanted.masked_fill(wanted == IGNORE, 0).aminmax()]
    facts = [is_picture.sum(1), needed.flatten(), torch.stack(extremes)]
    if filled is not None:
        closed = (filled[:, 1:] <= filled[:, :-1]).all()  # no token follows padding, no further conversation begins
        before = torch.nn.functional.pad(filled.cummax(1).values[:, :-1], (1, 0))
        broken = (run_starts(filled) & (filled > 0) & (filled <= before)).any()
        single = ((filled == 0) | (filled == filled.amax(1, keepdim=True))).all()
        full = (filled > 0).all() & single
        prefix = (filled[:, 0] > 0).all() & closed & single
        facts.append(torch.stack([full, prefix, broken, filled.min() < 0]).long())
    numbers, rows = torch.cat(facts).tolist(), len(ids)
    counts, needs, values = numbers[:rows], numbers[rows : 2 * rows], numbers[2 * rows : 2 * rows + 4]
    is_full, is_prefix, is_broken, is_negative = numbers[2 * rows + 4 :] or (1, 0, 0, 0)
    if segment_ids is not None and (is_broken or is_negative):
        raise SegmentError(
            "segment_ids must number the conversations of a row from 1 in rising order, each one unbroken run, "
            f"0 for padding; given: {segment_ids.tolist() if segment_ids.numel() <= 64 else _shape(segment_ids)}"
        )
    layout = Layout.FULL if is_full else Layout.PREFIX if is_prefix else Layout.HOLES if is_broken else Layout.RUNS
    return counts, needs, values, layout


def _length(given: dict[str, Tensor | None], rows: int, width: int, full: int, needed: int) -> int:
    """Positions of the expanded rows: as many as the tokens need, or `full` where something came as long as that."""
    length = needed
    for name, tensor in given.items():
        if tensor is None:
            continue
        allowed = sorted({width, needed, full})
        if tensor.dim() != 2 or tensor.shape[0] != rows or tensor.shape[1] not in allowed:
            lengths = " or ".join(map(str, allowed))
            raise LengthError(
                f"{name} must be ({rows}, {lengths}): as long as input_ids or as the expanded rows; given: "
                f"{_shape(tensor)}"
            )
        if tensor.shape[1] != width:
            length = max(length, tensor.shape[1])
    for name, tensor in given.items():
        if tensor is not None and tensor.shape[1] not in (width, length):
            raise LengthError(f"{name} has {tensor.shape[1]} positions where others came expanded to {length}")
    return length


def _finish(
    ids: Tensor, labels: Tensor | None, filled: Tensor | None, slots: Tensor, layout: Layout, width: int
) -> Expanded:
    """Take out labels that no position can be asked for, and find the places that are asked, and the runs."""
    segments = None if layout is Layout.FULL else filled
    asked = None
    if labels is not None:
        labels = labels.long().to(ids.device)
        if segments is not None:
            labels = labels.masked_fill((segments == 0) | run_starts(segments), IGNORE)
        if len(slots):
            labels = labels.flatten().index_fill(0, slots, IGNORE).view_as(labels)
        asked = torch.nn.functional.pad(labels[:, 1:] != IGNORE, (0, 1)).flatten().nonzero().flatten()
    runs = None
    if segments is not None and layout is Layout.RUNS:
        first = run_starts(segments).flatten().nonzero().flatten().tolist()
        runs = [stop - start for start, stop in pairwise([*first, segments.numel()])]
    return Expanded(ids, labels, asked, segments, slots, layout, runs, width)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
