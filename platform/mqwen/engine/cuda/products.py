"""Products of one row and of few rows with weights, bound by the memory's speed: what stands around them is fused in.

Where `overlap` is set, a kernel begins while the one before it still works, asks for its weights, and only then waits
for its inputs (programmatic dependent launch). Weights in 8 bits are widened to float16, two by an instruction; to
bfloat16 it would take more time than the memory. Shapes: M rows, K inputs, N outputs. Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

Weight8 = tuple[Tensor, Tensor]
"""(N, K) in 8 bits, and the scale (N,) of each output, float32: see mqwen.engine.float8."""

LINE = tl.constexpr(64)  # numbers of two bytes that the cache takes at once
LOWERED = tl.constexpr(2.0**-3)  # inputs in float16 then reach to 5e5, and are as exact as in bfloat16 from 1e-4 on
LARGEST = tl.constexpr(65504.0)  # of float16


def parts(weight: Tensor | Weight8 | None) -> tuple[Tensor | None, Tensor | None]:
    """Values and scales."""
    return weight if isinstance(weight, tuple) else (weight, None)


@triton.jit
def _normed(x, gain, at, inside, scale):
    """Inputs of a product, normalised in float32, rounded, then scaled, as `mqwen.model.blocks.RMSNorm` does it."""
    g = tl.load(gain + at, mask=inside, other=0.0)
    return ((tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale).to(g.dtype) * g).to(tl.float32)


@triton.jit
def _scale(x, eps, K: tl.constexpr, WIDE: tl.constexpr):
    k = tl.arange(0, WIDE)
    value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(value * value) / K + eps)


@triton.jit
def _wide(pointers, inside, SCALED: tl.constexpr):
    w = tl.load(pointers, mask=inside, other=0.0)
    if SCALED:
        w = w.to(tl.float16)
    return w.to(tl.float32)


@triton.jit
def _product_kernel(
    x, weight, scales, bias, gain, residual, out, eps, N,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < N
    rows = weight + n[:, None].to(tl.int64) * K
    k = tl.arange(0, BLOCK_K)
    w = _wide(rows + k[None, :], there[:, None] & (k < K)[None, :], SCALED)
    if SCALED:
        factors = tl.load(scales + n, mask=there, other=0.0)
    if BIAS:
        added = tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    if OVERLAP:  # the weights are on their way while the kernel before still works on x
        gdc_launch_dependents()
        gdc_wait()
    scale = 1.0
    if NORM:
        scale = _scale(x, eps, K, WIDE)
        a = _normed(x, gain, k, k < K, scale)
    else:
        a = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    sums = a[None, :] * w  # summed over K at the end, across threads
    for start in range(BLOCK_K, K, BLOCK_K):
        at = start + k
        w = _wide(rows + at[None, :], there[:, None] & (at < K)[None, :], SCALED)
        if NORM:  # noqa: SIM108  # Triton compiles one of the two
            a = _normed(x, gain, at, at < K, scale)
        else:
            a = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
        sums += a[None, :] * w
    result = tl.sum(sums, 1)
    if SCALED:
        result *= factors
    if BIAS:
        result += added
    if RESIDUAL:
        result += tl.load(residual + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=there)


def product(
    x: Tensor, weight: Tensor | Weight8, out: Tensor, bias: Tensor | None = None, gain: Tensor | None = None,
    residual: Tensor | None = None, eps: float = 0.0, block_n: int = 4, block_k: int = 2048, warps: int = 4,
    overlap: bool = False,
) -> Tensor:  # fmt: skip
    """out (1, N) = norm(x) (1, K) @ weight (N, K)^T + bias + residual; norm where `gain` is given."""
    values, scales = parts(weight)
    outputs, width = values.shape
    _product_kernel[(triton.cdiv(outputs, block_n),)](
        x, values, scales, bias, gain, residual, out, eps, outputs, width, block_n, block_k,
        triton.next_power_of_2(width), scales is not None, gain is not None, bias is not None, residual is not None,
        overlap, num_warps=warps, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out


@triton.jit
def _gate_kernel(
    x, up, up_scales, gate, gate_scales, gain, out, eps, N,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < N
    k = tl.arange(0, BLOCK_K)
    rows = n[:, None].to(tl.int64) * K
    here = there[:, None] & (k < K)[None, :]
    u = _wide(up + rows + k[None, :], here, SCALED)
    w = _wide(gate + rows + k[None, :], here, SCALED)
    if SCALED:
        up_factors = tl.load(up_scales + n, mask=there, other=0.0)
        gate_factors = tl.load(gate_scales + n, mask=there, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    scale = _scale(x, eps, K, WIDE)
    a = _normed(x, gain, k, k < K, scale)
    ups, gates = a[None, :] * u, a[None, :] * w
    for start in range(BLOCK_K, K, BLOCK_K):
        at = start + k
        here = there[:, None] & (at < K)[None, :]
        u = _wide(up + rows + at[None, :], here, SCALED)
        w = _wide(gate + rows + at[None, :], here, SCALED)
        a = _normed(x, gain, at, at < K, scale)
        ups += a[None, :] * u
        gates += a[None, :] * w
    raised, gated = tl.sum(ups, 1), tl.sum(gates, 1)
    if SCALED:
        raised, gated = raised * up_factors, gated * gate_factors
    tl.store(out + n, (raised * gated * tl.sigmoid(gated)).to(out.dtype.element_ty), mask=there)


def gated_product(
    x: Tensor, up: Tensor | Weight8, gate: Tensor | Weight8, gain: Tensor, out: Tensor, eps: float,
    block_n: int = 2, block_k: int = 2048, warps: int = 4, overlap: bool = False,
) -> Tensor:  # fmt: skip
    """out (1, N) = (norm(x) @ up^T) * silu(norm(x) @ gate^T). up and gate are of one kind."""
    (raising, raised), (gating, gated) = parts(up), parts(gate)
    outputs, width = raising.shape
    _gate_kernel[(triton.cdiv(outputs, block_n),)](
        x, raising, raised, gating, gated, gain, out, eps, outputs, width, block_n, block_k,
        triton.next_power_of_2(width), raised is not None, overlap, num_warps=warps,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out


@triton.jit
def _ask_for(pointers):
    """Has the memory bring what they point at into the second cache, and does not wait for it."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def _rows_kernel(
    x, weight, scale, gate, gate_scale, bias, residual, out, M, N,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr,
    HALF: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < N
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    rows = tl.where(there, n, 0)[:, None].to(tl.int64) * K
    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    gates = tl.zeros((ROWS, BLOCK_N), tl.float32)
    if OVERLAP:
        if AHEAD > 0:  # weights are on their way while the kernel before still works on x
            lines = tl.arange(0, AHEAD // LINE)[None, :] * LINE
            _ask_for(weight + rows + lines)
            if GATE:
                _ask_for(gate + rows + lines)
        gdc_wait()
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        at = start + k
        inside = at < K
        a = tl.load(x + m[:, None] * K + at[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
        if HALF:
            a = tl.clamp(a.to(tl.float32) * LOWERED, -LARGEST, LARGEST).to(tl.float16)
        w = tl.load(weight + rows + at[None, :], mask=inside[None, :], other=0.0)
        sums = tl.dot(a, tl.trans(w.to(a.dtype)), sums)
        if GATE:
            g = tl.load(gate + rows + at[None, :], mask=inside[None, :], other=0.0)
            gates = tl.dot(a, tl.trans(g.to(a.dtype)), gates)
    if OVERLAP:  # not earlier: waiting programs would take the working ones' room
        gdc_launch_dependents()
    raised: tl.constexpr = 1.0 / LOWERED if HALF else 1.0
    if SCALED:
        sums = sums * (tl.load(scale + n, mask=there, other=0.0) * raised)[None, :]
    if GATE:
        if SCALED:
            gates = gates * (tl.load(gate_scale + n, mask=there, other=0.0) * raised)[None, :]
        sums = sums * gates * tl.sigmoid(gates)
    if BIAS:
        sums += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[None, :]
    places = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & there[None, :]
    if RESIDUAL:
        sums += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=inside)


def rows_product(
    x: Tensor, weight: Tensor | Weight8, out: Tensor, gate: Tensor | Weight8 | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, block_n: int = 16, block_k: int = 256, warps: int = 4, stages: int = 4,
    ahead: int = 0, overlap: bool = False,
) -> Tensor:  # fmt: skip
    """out (M, N) = x (M, K) @ weight (N, K)^T, times silu(x @ gate^T), + bias + residual; for up to 64 rows.

    weight and gate, if any, are of one kind. ahead: with overlap, so many inputs' weights of 16 bits are asked for
    before x is there.
    """
    rows = x.shape[0]
    (values, scales), (gating, gated) = parts(weight), parts(gate)
    outputs, width = values.shape
    half = scales is not None and x.dtype is torch.bfloat16
    _rows_kernel[(triton.cdiv(outputs, block_n),)](
        x, values, scales, gating, gated, bias, residual, out, rows, outputs, width,
        max(16, triton.next_power_of_2(rows)), block_n, block_k, scales is not None, half, gate is not None,
        bias is not None, residual is not None, stages, overlap, ahead if ahead <= width else 0, num_warps=warps,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out
