"""Products with weights in 8 bits: see mqwen.engine.float8. For few rows only the weights' bytes count, and the rows
stay as they are; many are put into 8 bits too.

Shapes: M rows, K inputs, N outputs. Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mqwen.engine.float8 import KIND, MOST


@triton.jit
def _few_kernel(
    x, weight, scale, gate, gate_scale, bias, residual, out, M, N,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < N
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    rows = tl.where(there, n, 0)[:, None].to(tl.int64) * K
    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    gates = tl.zeros((ROWS, BLOCK_N), tl.float32)
    if OVERLAP:
        gdc_wait()
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        at = start + k
        inside = at < K
        a = tl.load(x + m[:, None] * K + at[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
        w = tl.load(weight + rows + at[None, :], mask=inside[None, :], other=0.0)
        sums = tl.dot(a, tl.trans(w.to(a.dtype)), sums)
        if GATE:
            g = tl.load(gate + rows + at[None, :], mask=inside[None, :], other=0.0)
            gates = tl.dot(a, tl.trans(g.to(a.dtype)), gates)
    if OVERLAP:  # not earlier: waiting programs would take the working ones' room
        gdc_launch_dependents()
    sums = sums * tl.load(scale + n, mask=there, other=0.0)[None, :]
    if GATE:
        gates = gates * tl.load(gate_scale + n, mask=there, other=0.0)[None, :]
        sums = sums * gates * tl.sigmoid(gates)
    if BIAS:
        sums += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[None, :]
    places = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & there[None, :]
    if RESIDUAL:
        sums += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=inside)


Weight = tuple[Tensor, Tensor]
"""(N, K) in 8 bits, and the scale (N,) of each output, float32."""


def few_product(
    x: Tensor, weight: Weight, out: Tensor, gate: Weight | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, block_n: int = 16, block_k: int = 256, warps: int = 4, stages: int = 4,
    overlap: bool = False,
) -> Tensor:  # fmt: skip
    """out (M, N) = x (M, K) @ weight^T, times silu(x @ gate^T), + bias + residual; for up to 16 rows."""
    rows = x.shape[0]
    outputs, width = weight[0].shape
    gates, gate_scale = gate or (None, None)
    _few_kernel[(triton.cdiv(outputs, block_n),)](
        x, *weight, gates, gate_scale, bias, residual, out, rows, outputs, width,
        max(16, triton.next_power_of_2(rows)), block_n, block_k, gate is not None, bias is not None,
        residual is not None, stages, overlap, num_warps=warps, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out


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


def many_product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x (M, K) @ weight^T + bias, of rows of any number."""
    rows, scales = in_8_bits(x)
    return torch._scaled_mm(
        rows, weight[0].t(), scale_a=scales, scale_b=weight[1].view(1, -1), bias=bias, out_dtype=x.dtype
    )
