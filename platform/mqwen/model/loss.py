"""Next-token cross-entropy, over all positions or only where there are labels.

Shapes: B rows, L positions, C hidden channels, V vocabulary, M labelled positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mqwen.model.splice import IGNORE

CHUNK = 2048  # labelled positions whose logits exist at one time


def token_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | float | None) -> Tensor:
    """Cross-entropy of logits (B, L, V) at each position against labels (B, L) of the next one; float32 scalar.

    Computed in float32 whatever the logits' dtype. The sum is divided by `num_items` (labelled positions of the whole
    global batch, say), or by the labelled positions here; without any label it is 0, not NaN.
    """
    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORE, reduction="sum")
    return total / _divisor(targets, num_items)


def labelled_loss(head: nn.Module, hidden: Tensor, labels: Tensor, num_items: Tensor | int | float | None) -> Tensor:
    """The same loss from the last hidden states (B, L, C), without the logits of positions that have no label.

    The labelled positions go through `head` in chunks, whose logits are computed again in the backward pass, so at most
    CHUNK * V of them exist at a time. The head runs in any case, without labels too: every rank of a sharded model
    then runs the same collectives.
    """
    targets = labels[:, 1:].flatten()
    places = (targets != IGNORE).nonzero().flatten()
    if len(places) == 0:
        places = places.new_zeros(1)  # its label is IGNORE: it adds 0
    chosen = hidden[:, :-1].flatten(0, 1)[places] if hidden.shape[1] > 1 else hidden[:, 0]
    wanted = targets[places] if len(targets) else targets.new_full((len(chosen),), IGNORE)

    def chunk_loss(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), targets, ignore_index=IGNORE, reduction="sum")

    total = torch.zeros((), device=hidden.device)
    for states, part in zip(chosen.split(CHUNK), wanted.split(CHUNK), strict=True):
        if torch.is_grad_enabled() and len(chosen) > CHUNK:
            total = total + checkpoint(chunk_loss, states, part, use_reentrant=False)
        else:
            total = total + chunk_loss(states, part)
    return total / _divisor(targets, num_items)


def _divisor(targets: Tensor, num_items: Tensor | int | float | None) -> Tensor | int | float:
    if num_items is None:
        return (targets != IGNORE).sum().clamp(min=1)
    return num_items.to(targets.device) if isinstance(num_items, Tensor) else num_items
