"""The gradient of the cross-entropy on a GPU: a row's logits are read twice and overwritten once.

A program of its own takes each row, as in Liger-Kernel (Hsu et al., 2024, section 3.2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mqwen.model.rows import IGNORE

BLOCK = 16384  # logits that a program holds at one time
WARPS = 16


def softmax_gradient_in_place(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `loss.softmax_gradient`; the gradient takes the memory of the logits (M, V), whose rows are contiguous."""
    losses = torch.empty(len(targets), device=logits.device)
    if len(targets):
        _row[(len(targets),)](
            logits, targets, losses, logits.stride(0), logits.shape[1], IGNORE, BLOCK, num_warps=WARPS
        )
    return losses.sum(), logits


@triton.jit
def _row(logits, targets, losses, stride, width, ignored: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    target = tl.load(targets + row)
    places = tl.arange(0, block)
    if target == ignored:
        tl.store(losses + row, 0.0)
        for start in range(0, width, block):
            tl.store(line + start + places, 0.0, mask=start + places < width)
        return
    hit = tl.load(line + target).to(tl.float32)
    largest = float("-inf")
    total = 0.0
    for start in range(0, width, block):
        scores = tl.load(line + start + places, mask=start + places < width, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(scores))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(scores - larger))
        largest = larger
    normal = largest + tl.log(total)
    tl.store(losses + row, normal - hit)
    tl.debug_barrier()  # all threads have read `hit`
    for start in range(0, width, block):
        scores = tl.load(line + start + places, mask=start + places < width, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(scores - normal) - tl.where(start + places == target, 1.0, 0.0)
        tl.store(line + start + places, gradient.to(logits.dtype.element_ty), mask=start + places < width)
