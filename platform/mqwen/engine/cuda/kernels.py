"""What a step does beside products with weights, fused so that little but the cache moves.

Where `overlap` is set, kernels begin while the one before still works: see products.py.

Shapes: M sequences with one new position each, T tokens of a step, C hidden channels, H heads, D channels of a head.
Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def early(overlap: bool) -> dict[str, bool]:
    """Launches a kernel while the one before it still works: it waits itself before it reads what that one writes."""
    return {"launch_pdl": True} if overlap else {}


@triton.jit
def _add_norm_kernel(
    x, residual, gain, out, eps,
    K: tl.constexpr, WIDE: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    k = tl.arange(0, WIDE)
    inside = k < K
    value = tl.load(x + row * K + k, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * K + k, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + row * K + k, rounded, mask=inside)
        value = rounded.to(tl.float32)
    g = tl.load(gain + k, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(value * value) / K + eps)
    tl.store(out + row * K + k, (value * scale).to(g.dtype) * g, mask=inside)


def add_norm(
    x: Tensor, residual: Tensor | None, gain: Tensor, out: Tensor, eps: float, overlap: bool = False
) -> Tensor:
    """residual += x, out = norm(residual); without a residual, out = norm(x). All (M, C)."""
    rows, width = x.shape
    wide = triton.next_power_of_2(width)
    _add_norm_kernel[(rows,)](
        x, residual, gain, out, eps, width, wide, residual is not None, overlap, num_warps=8, **early(overlap)
    )
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


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["given"])
def _receive_kernel(given, taken, N, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(taken + n, tl.load(given + n, mask=n < N), mask=n < N)


def receive(given: Tensor, taken: Tensor) -> None:
    """From pinned memory of the host, which the card reads itself: less than a copy waits before and after it."""
    count, block = given.numel(), 256
    _receive_kernel[(triton.cdiv(count, block),)](given, taken, count, block, num_warps=4)


@triton.jit
def _begin_kernel(
    ids, places, rotary, rows, positions, blocks, tables, embedding, x, turns,
    ids_stride, table_stride, C: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr,
    GROWS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + m)
    position = tl.load(positions + m)
    if GROWS:
        tl.store(tables + row * table_stride + position // SIZE, tl.load(blocks + m))
    token = tl.load(ids + row * ids_stride + position)
    c = tl.arange(0, WIDE)
    tl.store(x + m * C + c, tl.load(embedding + token * C + c, mask=c < C), mask=c < C)
    d = tl.arange(0, D)
    tl.store(turns + m * D + d, tl.load(rotary + (tl.load(places + row) + position) * D + d))


def begin(
    ids: Tensor, places: Tensor, rotary: Tensor, rows: Tensor, positions: Tensor, embedding: Tensor, x: Tensor,
    turns: Tensor, blocks: Tensor | None = None, tables: Tensor | None = None, size: int = 1,
) -> None:  # fmt: skip
    """The tokens' embeddings x (M, C), and their rotary factors turns (M, D): cosines, then sines.

    blocks: (M,), int64, of `size` positions, in which the tokens' lie; written into the tables, which may lack them.

    rows, positions: (M,), int64, of the tokens in the table ids. places: by row, where its angles begin in `rotary`.
    """
    width = embedding.shape[1]
    _begin_kernel[(len(rows),)](
        ids, places, rotary, rows, positions, blocks, tables, embedding, x, turns, ids.stride(0),
        0 if tables is None else tables.stride(0), width, turns.shape[1], triton.next_power_of_2(width), size,
        blocks is not None, num_warps=4,
    )  # fmt: skip


@triton.jit
def _turn(start, turns, d, D: tl.constexpr):
    """A head's channels at `start`, rotated, float32."""
    half: tl.constexpr = D // 2
    cos = tl.load(turns + d % half)
    sin = tl.load(turns + half + d % half)
    sin = tl.where(d < half, -sin, sin)
    return tl.load(start + d).to(tl.float32) * cos + tl.load(start + (d + half) % D).to(tl.float32) * sin


@triton.jit
def _take_in_kernel(
    qkv, turns, logn, keys, values, tables, rows, positions, query, table_stride,
    HEADS: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, LOGN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, WIDE)[:, None], tl.arange(0, D)[None, :]
    inside = (h < HEADS) & (d < D)
    position = tl.load(positions + token)
    half: tl.constexpr = D // 2
    cos = tl.load(turns + token * D + d % half)
    sin = tl.load(turns + token * D + half + d % half)
    sin = tl.where(d < half, -sin, sin)
    start = qkv + token * 3 * HEADS * D + h * D
    other = (d + half) % D
    q = tl.load(start + d, mask=inside, other=0.0).to(tl.float32) * cos
    q = (q + tl.load(start + other, mask=inside, other=0.0).to(tl.float32) * sin).to(query.dtype.element_ty)
    if LOGN:
        q = (q.to(tl.float32) * tl.load(logn + position)).to(query.dtype.element_ty)
    tl.store(query + (token * HEADS + h) * D + d, q, mask=inside)
    block = tl.load(tables + tl.load(rows + token) * table_stride + position // SIZE)
    place = ((block * HEADS + h) * SIZE + position % SIZE) * D + d
    start += HEADS * D
    k = tl.load(start + d, mask=inside, other=0.0).to(tl.float32) * cos
    k += tl.load(start + other, mask=inside, other=0.0).to(tl.float32) * sin
    tl.store(keys + place, k.to(keys.dtype.element_ty), mask=inside)
    tl.store(values + place, tl.load(start + HEADS * D + d, mask=inside, other=0.0), mask=inside)


def take_in(
    qkv: Tensor, turns: Tensor, logn: Tensor | None, keys: Tensor, values: Tensor, tables: Tensor, rows: Tensor,
    positions: Tensor,
) -> Tensor:  # fmt: skip
    """Rotated queries (T, H, D); keys, rotated, and values go into the cache. Arguments: as `attend` has them."""
    _, heads, size, channels = keys.shape
    query = qkv.new_empty(len(qkv), heads, channels)
    _take_in_kernel[(len(qkv),)](
        qkv, turns, logn, keys, values, tables, rows, positions, query, tables.stride(0), heads,
        triton.next_power_of_2(heads), channels, size, logn is not None, num_warps=4,
    )  # fmt: skip
    return query


@triton.jit
def _attend_prompts_kernel(
    query, keys, values, tables, rows, positions, tiles, scale, table_stride, COUNT,
    HEADS: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(tiles + tile)
    count = tl.load(tiles + COUNT + tile)
    if count > 0:
        start = tl.load(positions + first)  # of the tile's first query
        table = tables + tl.load(rows + first) * table_stride
        m, d = tl.arange(0, BLOCK_M), tl.arange(0, D)
        there = (m < count)[:, None]
        places = ((first + m)[:, None] * HEADS + head) * D + d[None, :]
        q = tl.load(query + places, mask=there, other=0.0)
        scale = scale * 1.4426950408889634  # exp2 instead of exp
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        mass = tl.zeros((BLOCK_M,), tl.float32)
        mixed = tl.zeros((BLOCK_M, D), tl.float32)
        for at in range(0, start + count, BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            read = tl.minimum(n, start + count - 1)  # what lies after it is none of this sequence's
            block = tl.load(table + read // SIZE)
            spots = ((block * HEADS + head) * SIZE + read % SIZE)[:, None] * D + d[None, :]
            k = tl.load(keys + spots)
            score = tl.dot(q, tl.trans(k)) * scale
            score = tl.where(n[None, :] <= (start + m)[:, None], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            shrink = tl.exp2(peak - higher)
            mass = mass * shrink + tl.sum(weight, 1)
            v = tl.load(values + spots)
            mixed = tl.dot(weight.to(v.dtype), v, mixed * shrink[:, None])
            peak = higher
        tl.store(query + places, (mixed / mass[:, None]).to(query.dtype.element_ty), mask=there)


TILE = 64  # queries of a program


def attend_prompts(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, rows: Tensor, positions: Tensor, tiles: Tensor,
    block: int = 32, warps: int = 4, stages: int = 4,
) -> Tensor:  # fmt: skip
    """What queries of prompts see in the cache, where their own keys and values are too: (T, C), in their place.

    query: (T, H, D). tiles: (2, N), int64: the first token of up to TILE that follow one another in a sequence, and
    how many they are; 0 for none. The rest: as `attend` has them.
    """
    _, heads, channels = query.shape
    _attend_prompts_kernel[(tiles.shape[1], heads)](
        query, keys, values, tables, rows, positions, tiles, channels**-0.5, tables.stride(0), tiles.shape[1], heads,
        channels, keys.shape[2], TILE, block, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return query.flatten(1)


@triton.jit
def _attend_kernel(
    qkv, turns, logn, keys, values, tables, rows, positions, out, partial, peaks, masses, counters, scale,
    table_stride,
    HEADS: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    PAD: tl.constexpr, LOGN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, D)
    past = tl.load(positions + row)  # positions in the cache before this one
    each = tl.cdiv(tl.cdiv(past, SPLITS), BLOCK) * BLOCK
    first = split * each
    last = tl.minimum(first + each, past)
    table = tables + tl.load(rows + row) * table_stride

    if OVERLAP:
        if SPLITS > 4:  # else programs that wait would take the room of those that work
            gdc_launch_dependents()
        gdc_wait()
    start = qkv + row.to(tl.int64) * 3 * HEADS * D + head * D
    q = _turn(start, turns + row * D, d, D).to(qkv.dtype.element_ty)
    if LOGN:
        q = (q.to(tl.float32) * tl.load(logn + past)).to(qkv.dtype.element_ty)
    scale = scale * 1.4426950408889634  # exp2 instead of exp
    peak = float("-inf")
    mass = 0.0
    # On the tensor cores, sixteen times the same query: what a product loads comes ahead of time.
    queries = (tl.zeros((16, D), tl.float32) + q.to(tl.float32)[None, :]).to(qkv.dtype.element_ty)
    many = tl.zeros((16, D), tl.float32)
    for at in range(first, last, BLOCK):
        n = at + tl.arange(0, BLOCK)
        inside = n < last
        block = tl.load(table + n // SIZE, mask=inside, other=0)
        places = ((block * HEADS + head) * SIZE + n % SIZE)[:, None] * D + d[None, :]
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
    if OVERLAP and SPLITS <= 4:
        gdc_launch_dependents()
    mixed = tl.sum(many, 0) / 16
    if split == SPLITS - 1:  # the new position: into the cache, and seen
        new_key = _turn(start + HEADS * D, turns + row * D, d, D).to(keys.dtype.element_ty)
        new_value = tl.load(start + 2 * HEADS * D + d)
        place = ((tl.load(table + past // SIZE) * HEADS + head) * SIZE + past % SIZE) * D + d
        tl.store(keys + place, new_key)
        tl.store(values + place, new_value)
        score = tl.sum(new_key.to(tl.float32) * q.to(tl.float32)) * scale
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
            spots = partial + (place + part)[:, None] * D + d[None, :]
            parts = tl.load(spots, mask=(part < SPLITS)[:, None], other=0.0, volatile=True)
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
    qkv: Tensor, turns: Tensor, logn: Tensor | None, keys: Tensor, values: Tensor, tables: Tensor,
    rows: Tensor, positions: Tensor, out: Tensor, scratch: Scratch, overlap: bool = False,
    block: int = 64, warps: int = 2, stages: int = 2,
) -> Tensor:  # fmt: skip
    """Rotate q and k, write k and v into the cache, and attend to all that is there: flash decoding over pages.

    Args:
        qkv: (M, 3 C), of one new position a sequence. turns: (M, D). logn: factors of queries by position, or None.
        keys, values: (blocks, H, size, D), one layer's.
        tables: int64: position n of row r lies in block tables[r, n // size].
        rows, positions: (M,), int64: the sequences' rows, and where their new positions stand.
        out: (M, C).

    The parts of a sequence are joined as in Flash-Decoding (Dao et al., 2023).
    """
    _, heads, size, channels = keys.shape
    s = scratch.splits
    _attend_kernel[(len(qkv), heads, s)](
        qkv, turns, logn, keys, values, tables, rows, positions, out, scratch.partial, scratch.peaks, scratch.masses,
        scratch.counters, channels**-0.5, tables.stride(0),
        heads, channels, size, block, s, triton.next_power_of_2(s), logn is not None, overlap,
        num_warps=warps, num_stages=stages, **early(overlap),
    )  # fmt: skip
    return out
