"""What a decode step does beside plain matrix products, fused so that little but weights and cache moves.

Shapes: M rows (sequences, one new position each), C hidden channels, H heads, D channels of a head, N outputs of a
product, K its inputs, S positions of a block of the KV cache. Products accumulate in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait



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
def _product_kernel(
    x, weight, bias, gain, residual, out, eps, N,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < N
    rows = weight + n[:, None].to(tl.int64) * K
    k = tl.arange(0, BLOCK_K)
    w = tl.load(rows + k[None, :], mask=there[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
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
        w = tl.load(rows + at[None, :], mask=there[:, None] & (at < K)[None, :], other=0.0).to(tl.float32)
        if NORM:
            a = _normed(x, gain, at, at < K, scale)
        else:
            a = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
        sums += a[None, :] * w
    result = tl.sum(sums, 1)
    if BIAS:
        result += added
    if RESIDUAL:
        result += tl.load(residual + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=there)


def product(
    x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None, gain: Tensor | None = None,
    residual: Tensor | None = None, eps: float = 0.0, block_n: int = 4, block_k: int = 2048, warps: int = 4,
    overlap: bool = False,
) -> Tensor:  # fmt: skip
    """out (1, N) = norm(x) (1, K) @ weight (N, K)^T + bias + residual; norm where `gain` is given."""
    outputs, width = weight.shape
    _product_kernel[(triton.cdiv(outputs, block_n),)](
        x, weight, bias, gain, residual, out, eps, outputs, width, block_n, block_k, triton.next_power_of_2(width),
        gain is not None, bias is not None, residual is not None, overlap, num_warps=warps,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out


@triton.jit
def _gate_kernel(
    x, up, gate, gain, out, eps, N,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < N
    k = tl.arange(0, BLOCK_K)
    rows = n[:, None].to(tl.int64) * K
    here = there[:, None] & (k < K)[None, :]
    u = tl.load(up + rows + k[None, :], mask=here, other=0.0).to(tl.float32)
    w = tl.load(gate + rows + k[None, :], mask=here, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    scale = _scale(x, eps, K, WIDE)
    a = _normed(x, gain, k, k < K, scale)
    ups, gates = a[None, :] * u, a[None, :] * w
    for start in range(BLOCK_K, K, BLOCK_K):
        at = start + k
        here = there[:, None] & (at < K)[None, :]
        u = tl.load(up + rows + at[None, :], mask=here, other=0.0).to(tl.float32)
        w = tl.load(gate + rows + at[None, :], mask=here, other=0.0).to(tl.float32)
        a = _normed(x, gain, at, at < K, scale)
        ups += a[None, :] * u
        gates += a[None, :] * w
    raised, gated = tl.sum(ups, 1), tl.sum(gates, 1)
    tl.store(out + n, (raised * gated * tl.sigmoid(gated)).to(out.dtype.element_ty), mask=there)


def gated_product(
    x: Tensor, up: Tensor, gate: Tensor, gain: Tensor, out: Tensor, eps: float,
    block_n: int = 2, block_k: int = 2048, warps: int = 4, overlap: bool = False,
) -> Tensor:  # fmt: skip
    """out (1, N) = (norm(x) @ up^T) * silu(norm(x) @ gate^T)."""
    outputs, width = up.shape
    _gate_kernel[(triton.cdiv(outputs, block_n),)](
        x, up, gate, gain, out, eps, outputs, width, block_n, block_k, triton.next_power_of_2(width), overlap,
        num_warps=warps, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out


@triton.jit
def _prefetch(pointers):
    """Ask for cache lines of 128 bytes without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _rows_kernel(
    x, weight, gate, bias, residual, out, M, N,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LINES: tl.constexpr,
    GATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < N
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    rows = tl.where(there, n, 0)[:, None].to(tl.int64) * K
    if OVERLAP:
        lines = tl.arange(0, LINES) * 64
        lines = tl.where(lines < K, lines, 0)
        _prefetch(weight + rows + lines[None, :])
        if GATE:
            _prefetch(gate + rows + lines[None, :])
        gdc_launch_dependents()
        gdc_wait()
    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    gates = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        at = start + k
        inside = at < K
        a = tl.load(x + m[:, None] * K + at[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
        w = tl.load(weight + rows + at[None, :], mask=inside[None, :], other=0.0)
        sums = tl.dot(a, tl.trans(w), sums)
        if GATE:
            g = tl.load(gate + rows + at[None, :], mask=inside[None, :], other=0.0)
            gates = tl.dot(a, tl.trans(g), gates)
    if GATE:
        sums = sums * gates * tl.sigmoid(gates)
    if BIAS:
        sums += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[None, :]
    places = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & there[None, :]
    if RESIDUAL:
        sums += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=inside)


def rows_product(
    x: Tensor, weight: Tensor, out: Tensor, gate: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, block_n: int = 16, block_k: int = 256, warps: int = 4, stages: int = 4,
    overlap: bool = False,
) -> Tensor:  # fmt: skip
    """out (M, N) = x (M, K) @ weight (N, K)^T, times silu(x @ gate^T), + bias + residual; for up to 64 rows."""
    rows = x.shape[0]
    outputs, width = weight.shape
    _rows_kernel[(triton.cdiv(outputs, block_n),)](
        x, weight, gate, bias, residual, out, rows, outputs, width, max(16, triton.next_power_of_2(rows)), block_n,
        block_k, triton.next_power_of_2(triton.cdiv(width, 64)), gate is not None, bias is not None,
        residual is not None, overlap, stages, num_warps=warps, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out


@triton.jit
def _add_norm_kernel(
    x, residual, gain, out, eps,
    K: tl.constexpr, WIDE: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    k = tl.arange(0, WIDE)
    inside = k < K
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + row * K + k, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * K + k, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + row * K + k, rounded, mask=inside)
        value = rounded.to(tl.float32)
    g = tl.load(gain + k, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(value * value) / K + eps)
    tl.store(out + row * K + k, (value * scale).to(g.dtype) * g, mask=inside)


def add_norm(x: Tensor, residual: Tensor | None, gain: Tensor, out: Tensor, eps: float, overlap: bool = False) -> Tensor:
    """residual += x, out = norm(residual); without a residual, out = norm(x). All (M, C)."""
    rows, width = x.shape
    wide = triton.next_power_of_2(width)
    _add_norm_kernel[(rows,)](
        x, residual, gain, out, eps, width, wide, residual is not None, overlap, num_warps=8,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out


@triton.jit
def _silu_mul_kernel(both, out, N: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    up = tl.load(both + row * 2 * N + n, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(both + row * 2 * N + N + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, (up * gate * tl.sigmoid(gate)).to(out.dtype.element_ty), mask=inside)


def silu_mul(both: Tensor, out: Tensor) -> Tensor:
    """both (M, 2 N), up then gate, to out (M, N) = up * silu(gate)."""
    rows, width = out.shape
    block = 1024
    _silu_mul_kernel[(rows, triton.cdiv(width, block))](both, out, width, block, num_warps=4)
    return out


@triton.jit
def _angles_kernel(positions, bases, cos, sin, HALF: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, HALF)
    position = tl.load(positions + row).to(tl.float32)
    base = tl.load(bases + row)  # float64: base^(-2i/D) rounded as the model's tables are
    frequency = tl.exp(-(i.to(tl.float64) / HALF) * tl.log(base)).to(tl.float32)
    tl.store(cos + row * HALF + i, tl.cos(position * frequency))
    tl.store(sin + row * HALF + i, tl.sin(position * frequency))


def angles(positions: Tensor, bases: Tensor, cos: Tensor, sin: Tensor) -> None:
    """cos, sin (M, D / 2), float32, of positions (M,), int32, with each row's own rotary base (M,), float64."""
    _angles_kernel[(positions.shape[0],)](positions, bases, cos, sin, cos.shape[1], num_warps=1)


@triton.jit
def _attend_kernel(
    qkv, cos, sin, logn, keys, values, tables, positions, out, partial, peaks, masses, counters, scale,
    table_stride, block_stride, head_stride,
    HEADS: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    PAD: tl.constexpr, DOT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, D)
    past = tl.load(positions + row)  # positions in the cache before this one
    each = tl.cdiv(tl.cdiv(past, SPLITS), BLOCK) * BLOCK
    first = split * each
    last = tl.minimum(first + each, past)
    table = tables + row * table_stride

    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    half: tl.constexpr = D // 2
    c = tl.load(cos + row * half + d % half)
    s = tl.load(sin + row * half + d % half)
    s = tl.where(d < half, -s, s)
    start = qkv + row.to(tl.int64) * 3 * HEADS * D + head * D
    other = (d + half) % D
    q = tl.load(start + d).to(tl.float32) * c + tl.load(start + other).to(tl.float32) * s
    q = q.to(qkv.dtype.element_ty).to(tl.float32) * tl.load(logn + row)
    q = q.to(qkv.dtype.element_ty).to(tl.float32)
    scale = scale * 1.4426950408889634
    peak = float("-inf")
    mass = 0.0
    mixed = tl.zeros((D,), tl.float32)
    if DOT:  # on the tensor cores, sixteen times the same query: their loads run ahead
        many = tl.zeros((16, D), tl.float32)
        queries = (tl.zeros((16, D), tl.float32) + q[None, :]).to(qkv.dtype.element_ty)
        for at in range(first, last, BLOCK):
            n = at + tl.arange(0, BLOCK)
            inside = n < last
            block = tl.load(table + n // SIZE, mask=inside, other=0).to(tl.int64)
            places = (block * block_stride + head * head_stride + (n % SIZE) * D)[:, None] + d[None, :]
            k = tl.load(keys + places, mask=inside[:, None], other=0.0)
            score = tl.dot(queries, tl.trans(k)) * scale
            score = tl.where(inside[None, :], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score))
            weight = tl.exp2(score - higher)
            shrink = tl.exp2(peak - higher)
            mass = mass * shrink + tl.sum(weight) / 16
            v = tl.load(values + places, mask=inside[:, None], other=0.0)
            many = tl.dot(weight.to(v.dtype), v, many * shrink)
            peak = higher
        mixed = tl.sum(many, 0) / 16
    else:
        for at in range(first, last, BLOCK):
            n = at + tl.arange(0, BLOCK)
            inside = n < last
            block = tl.load(table + n // SIZE, mask=inside, other=0).to(tl.int64)
            places = (block * block_stride + head * head_stride + (n % SIZE) * D)[:, None] + d[None, :]
            k = tl.load(keys + places, mask=inside[:, None], other=0.0)
            v = tl.load(values + places, mask=inside[:, None], other=0.0)
            score = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale
            score = tl.where(inside, score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score))
            weight = tl.exp2(score - higher)
            shrink = tl.exp2(peak - higher)
            mass = mass * shrink + tl.sum(weight)
            mixed = mixed * shrink + tl.sum(v.to(tl.float32) * weight[:, None], 0)
            peak = higher
    if split == SPLITS - 1:  # the new position: into the cache, and seen
        start += HEADS * D
        new_key = tl.load(start + d).to(tl.float32) * c + tl.load(start + other).to(tl.float32) * s
        new_key = new_key.to(keys.dtype.element_ty)
        new_value = tl.load(start + HEADS * D + d)
        block = tl.load(table + past // SIZE).to(tl.int64)
        place = block * block_stride + head * head_stride + (past % SIZE) * D + d
        tl.store(keys + place, new_key)
        tl.store(values + place, new_value)
        score = tl.sum(new_key.to(tl.float32) * q) * scale
        higher = tl.maximum(peak, score)
        weight = tl.exp2(score - higher)
        shrink = tl.exp2(peak - higher)
        mass = mass * shrink + weight
        mixed = mixed * shrink + new_value.to(tl.float32) * weight
        peak = higher
    if SPLITS == 1:
        tl.store(out + (row * HEADS + head).to(tl.int64) * D + d, (mixed / mass).to(out.dtype.element_ty))
    else:
        place = (row * HEADS + head) * SPLITS + split
        tl.store(partial + place * D + d, mixed)
        tl.store(peaks + place, peak)
        tl.store(masses + place, mass)
        # The split that comes last puts the parts together.
        tl.debug_barrier()
        if tl.atomic_add(counters + row * HEADS + head, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(counters + row * HEADS + head, 0)
            part = tl.arange(0, PAD)
            place = (row * HEADS + head) * SPLITS
            tops = tl.load(peaks + place + part, mask=part < SPLITS, other=float("-inf"), volatile=True)
            share = tl.exp2(tops - tl.max(tops))
            whole = tl.sum(tl.load(masses + place + part, mask=part < SPLITS, other=0.0, volatile=True) * share)
            rows = partial + (place + part)[:, None] * D + d[None, :]
            parts = tl.load(rows, mask=(part < SPLITS)[:, None], other=0.0, volatile=True)
            mixed = tl.sum(parts * share[:, None], 0) / whole
            tl.store(out + (row * HEADS + head).to(tl.int64) * D + d, mixed.to(out.dtype.element_ty))


class Scratch:
    """Room for the parts of split attention: partial (M * H * splits, D), and one counter for each row and head."""

    def __init__(self, rows: int, heads: int, channels: int, splits: int, device: torch.device) -> None:
        self.splits = splits
        self.partial = torch.empty(rows * heads * splits, channels, device=device)
        self.peaks = torch.empty(rows * heads * splits, device=device)
        self.masses = torch.empty(rows * heads * splits, device=device)
        self.counters = torch.zeros(rows * heads, dtype=torch.int32, device=device)


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, logn: Tensor, keys: Tensor, values: Tensor, tables: Tensor,
    positions: Tensor, out: Tensor, scratch: Scratch, block: int = 64, warps: int = 2, stages: int = 3,
    dot: bool = False, overlap: bool = False,
) -> Tensor:  # fmt: skip
    """Rotate q and k, write k and v into the cache, and attend to all that is there: flash decoding over pages.

    Args:
        qkv: (M, 3 C). cos, sin: (M, D / 2), float32. logn: (M,), float32.
        keys, values: (blocks, H, S, D), one layer's.
        tables: (M, blocks of a sequence), int32: row m's position n lies in block tables[m, n // S].
        positions: (M,), int32: where the new position stands, that is how many came before it.
        out: (M, C).

    The parts of a sequence are joined as in Flash-Decoding (Dao et al., 2023).
    """
    rows = qkv.shape[0]
    _, heads, size, channels = keys.shape
    s = scratch.splits
    _attend_kernel[(rows, heads, s)](
        qkv, cos, sin, logn, keys, values, tables, positions, out, scratch.partial, scratch.peaks, scratch.masses,
        scratch.counters, channels**-0.5, tables.stride(0), keys.stride(0), keys.stride(1),
        heads, channels, size, block, s, triton.next_power_of_2(s), dot, overlap, num_warps=warps, num_stages=stages,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out
