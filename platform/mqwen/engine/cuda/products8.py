"""Products of many rows with weights in 8 bits, into which the rows are put too: see mqwen.engine.float8. Those of few
rows, for which only the weights' bytes count, are products.py's.

Shapes: M rows, K inputs, N outputs. Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mqwen.engine.cuda.products import Weight8
from mqwen.engine.float8 import KIND, MOST


@triton.jit
def _round_kernel(x, out, scales, stride, K: tl.constexpr, WIDE: tl.constexpr, MOST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDE)
    value = tl.load(x + row * stride + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value)), 1e-12) / MOST
    tl.store(out + row * K + k, (value / scale).to(out.dtype.element_ty), mask=k < K)
    tl.store(scales + row, scale)


def in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `mqwen.engine.float8.in_8_bits` does, as one kernel."""
    rows, width = x.shape
    out, scales = x.new_empty(rows, width, dtype=KIND), x.new_empty(rows, 1, dtype=torch.float32)
    _round_kernel[(rows,)](x, out, scales, x.stride(0), width, triton.next_power_of_2(width), MOST, num_warps=8)
    return out, scales


def many_product(x: Tensor, weight: Weight8, bias: Tensor | None = None) -> Tensor:
    """x (M, K) @ weight^T + bias, of rows of any number."""
    rows, scales = in_8_bits(x)
    return torch._scaled_mm(
        rows, weight[0].t(), scale_a=scales, scale_b=weight[1].view(1, -1), bias=bias, out_dtype=x.dtype
    )
