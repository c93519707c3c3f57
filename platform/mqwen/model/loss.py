"""Next-token cross-entropy, over all positions or only where there are labels.

Shapes: B rows, L positions, C hidden channels, V vocabulary, M labelled positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mqwen.model.rows import IGNORE, Expanded

CHUNK = 4096  # labelled positions whose logits exist at one time

Kernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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

    At most CHUNK * V logits exist at a time. The head runs in any case, without labels too: every rank of a sharded
    model then runs the same collectives.
    """
    assert rows.labels is not None and rows.asked is not None
    places, labels = rows.asked, rows.labels.flatten()
    if len(places):
        states, targets = hidden.flatten(0, 1).index_select(0, places), labels[places + 1]
    else:
        states, targets = hidden[0, :1], labels.new_full((1,), IGNORE)  # adds 0
    total = head(states, targets) if isinstance(head, Head) else _through(head, states, targets)
    return total / _divisor(rows, num_items)


class Head(nn.Linear):
    """Hidden states to logits; or, where targets are given, to the sum of their cross-entropies.

    `kernel` computes a chunk's losses and gradients; a compiled one can take its place.
    """

    def __init__(self, channels: int, vocabulary: int) -> None:
        super().__init__(channels, vocabulary, bias=False)
        self.kernel: Kernel = softmax_gradient

    def forward(self, states: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return super().forward(states)
        return linear_cross_entropy(states, self.weight, targets, self.kernel, CHUNK)


def linear_cross_entropy(states: Tensor, weight: Tensor, targets: Tensor, kernel: Kernel, chunk: int) -> Tensor:
    """Sum of the cross-entropies of states @ weight.T, float32 scalar, from `chunk` positions' logits at a time.

    The gradients are computed on the way, while a chunk's logits are there, and only scaled in the backward pass: no
    logits are kept or computed twice (as Liger-Kernel does; Hsu et al., 2024, section 3.2).

    Args:
        states: (M, C).
        weight: (V, C).
        targets: (M,), integers; IGNORE adds nothing.
        kernel: as `softmax_gradient`.
    """
    if torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(states, weight, targets, kernel, chunk)
    parts = zip(states.split(chunk), targets.split(chunk), strict=True)
    return torch.stack([_summed(F.linear(some, weight), theirs) for some, theirs in parts]).sum()


def softmax_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of logits (M, V), a float32 scalar, and its gradient, as the logits.

    Computed in float32 whatever the logits' dtype.
    """
    scores = logits.float()
    normal = scores.logsumexp(1, keepdim=True)
    counted = (targets != IGNORE).unsqueeze(1)
    index = targets.unsqueeze(1).clamp(min=0)
    loss = torch.where(counted, normal - scores.gather(1, index), 0.0).sum()
    hit = torch.arange(logits.shape[1], device=logits.device) == index
    gradient = torch.where(counted, (scores - normal).exp() - hit.float(), 0.0)
    return loss, gradient.to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, kernel: Kernel, chunk: int) -> Tensor:
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), device=states.device)
        grad_states = torch.empty_like(states) if needs_states else None
        # Over many chunks small contributions would be lost in fewer bits.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(states), chunk):
            some = states[start : start + chunk]
            loss, gradient = kernel(F.linear(some, weight), targets[start : start + chunk])
            total += loss
            if grad_states is not None:
                torch.mm(gradient, weight, out=grad_states[start : start + chunk])
            if grad_weight is not None:
                _add_product(grad_weight, gradient.t(), some)
        ctx.save_for_backward(grad_states, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if known is None else known * grads[0].to(known.dtype) for known in ctx.saved_tensors]
        return *scaled, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be wider than a and b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _through(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """Any head's loss, as one with an adapter; a chunk's logits are computed again in the backward pass."""
    total = torch.zeros((), device=states.device)
    for some, theirs in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
        if torch.is_grad_enabled() and len(states) > CHUNK:
            total = total + checkpoint(lambda x, y: _summed(head(x), y), some, theirs, use_reentrant=False)
        else:
            total = total + _summed(head(some), theirs)
    return total


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")


def _divisor(rows: Expanded, num_items: Tensor | int | float | None) -> Tensor | int | float:
    assert rows.asked is not None
    if num_items is None:
        return max(len(rows.asked), 1)
    return num_items.to(rows.ids.device) if isinstance(num_items, Tensor) else num_items
