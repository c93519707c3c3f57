"""What a batch of rows looks like to the network, once pictures have their places.

Shapes: B rows, L positions of a row, P positions of a picture, N pictures, M labelled positions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # a label that no loss is computed for


class Layout(Enum):
    """How the rows are filled, which decides on the attention kernel."""

    FULL = "every position is a token of one conversation"
    PREFIX = "one conversation a row, padding only at its end"
    RUNS = "conversations and padding are unbroken runs"
    HOLES = "a conversation with masked positions inside"


@dataclass(frozen=True)
class Expanded:
    """Rows after expansion.

    Attributes:
        ids: (B, L), int64; picture positions hold the placeholder's id, padding that expansion added holds 0.
        labels: (B, L), int64, or None. Aligned with ids (the shift by one is the loss's); -100 at picture positions,
            padding, and each conversation's first token, which nothing inside of the conversation predicts.
        asked: (M,), int64, or None without labels: places in the flattened (B * L) whose next position has a label.
        segments: (B, L), int64, or None when layout is FULL: 0 padding, from 1 the conversation.
        slots: (N * P,), int64: places of the picture positions in the flattened (B * L), in the pictures' order.
        layout: how the rows are filled.
        runs: lengths of the runs of equal segments in the flattened (B * L), when layout is RUNS; on the host.
        token_count: ids of a row before expansion.
    """

    ids: Tensor
    labels: Tensor | None
    asked: Tensor | None
    segments: Tensor | None
    slots: Tensor
    layout: Layout
    runs: list[int] | None
    token_count: int

    def to(self, device: torch.device) -> Expanded:
        """The same on another device, copied without waiting."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def positions_of(expanded: Expanded) -> Tensor:
    """Position of each place in its conversation, from 0: (B, L), or (1, L) where all rows are alike; int64.

    Runs restart at 0; a conversation with holes counts its tokens only.
    """
    segments = expanded.segments
    places = torch.arange(expanded.ids.shape[1], device=expanded.ids.device)
    if segments is None:
        return places.unsqueeze(0)
    if expanded.layout is Layout.HOLES:
        return ((segments > 0).long().cumsum(1) - 1).clamp(min=0)
    return places - torch.where(run_starts(segments), places, 0).cummax(1).values


def lengths_of(expanded: Expanded) -> Tensor:
    """Length of the conversation that each place belongs to: (B, L), or (1, 1) where all rows are alike; int64."""
    segments = expanded.segments
    if segments is None:
        return torch.full((1, 1), expanded.ids.shape[1], device=expanded.ids.device)
    if expanded.layout is Layout.HOLES:
        return (segments > 0).sum(1, keepdim=True).expand_as(segments)
    runs = run_starts(segments).long().cumsum(1) - 1
    return torch.zeros_like(segments).scatter_add_(1, runs, torch.ones_like(runs)).gather(1, runs)


def run_starts(segments: Tensor) -> Tensor:
    """True where a run of equal segment ids begins: (B, L), bool. A row's first place always does."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return starts
