"""Next-token cross-entropy, over all positions or only where there are labels.

Shapes: B rows, L positions, C hidden channels, V vocabulary, M labelled positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mqwen.model.rows import IGNORE, Expanded

CHUNK = 2048  # labelled positions whose logits exist at one time


def token_loss(logits: Tensor, rows: Expanded, num_items: Tensor | int | float | None) -> Tensor:
    """Cross-entropy of logits (B, L, V) at each position against the label of the next one; float32 scalar.

    Computed in float32 whatever the logits' dtype. The sum is divided by `num_items` (labelled positions of the whole
    global batch, say), or by the labelled positions here; without any label it is 0, not NaN.
    """
    assert rows.labels is not None
    predicted, targets = logits[:, :-1].flatten(0, 1), rows.labels[:, 1:].flatten()
    return _summed(predicted, targets) / _divisor(rows, num_items)


def labelled_loss(head: nn.Module, hidden: Tensor, rows: Expanded, num_items: Tensor | int | float | None) -> Tensor:
    """The same loss from the last hidden states (B, L, C), without the logits of positions that have no label.

    The labelled positions go through `head` in chunks, whose logits are computed again in the backward pass, so at most
    CHUNK * V of them exist at a time. The head runs in any case, without labels too: every rank of a sharded model
    then runs the same collectives.
    """
    assert rows.labels is not None and rows.asked is not None
    places, labels = rows.asked, rows.labels.flatten()
    if len(places):
        states, targets = hidden.flatten(0, 1).index_select(0, places), labels[places + 1]
    else:
        states, targets = hidden[0, :1], labels.new_full((1,), IGNORE)  # adds 0

    total = torch.zeros((), device=hidden.device)
    for some, theirs in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
        if torch.is_grad_enabled() and len(states) > CHUNK:
            total = total + checkpoint(lambda x, y: _summed(head(x), y), some, theirs, use_reentrant=False)
        else:
            total = total + _summed(head(some), theirs)
    return total / _divisor(rows, num_items)


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")


def _divisor(rows: Expanded, num_items: Tensor | int | float | None) -> Tensor | int | float:
    assert rows.asked is not None
    if num_items is None:
        return max(len(rows.asked), 1)
    return num_items.to(rows.ids.device) if isinstance(num_items, Tensor) else num_items
