"""Draws from what temperature, top_k, top_p and min_p leave of the logits, without sorting them.

A token is drawn from all that may come. Is it in the nucleus, that is, do the likelier ones together stay below top_p,
it is taken; else neither it nor a less likely one can be, and the next is drawn from the rest. What is taken is then
distributed as a draw from the nucleus itself (rejection sampling, as in FlashInfer, Ye et al. 2025, arXiv:2501.01005).
Equally likely tokens are all inside, or all outside.

A row is one program's, which does the same whatever the others do: a seed draws the same in any company.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _uniform(seed, position, turn):
    """In [0, 1): SplitMix64, as `mqwen.engine.sampler.uniform`; other numbers for each turn at a position."""
    x = seed + (position + 1 + (turn << 32)) * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return ((x >> 40) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _scores(logits, at, V, peak, sharpness):
    """Logits over temperature, the likeliest at 0; -inf past the end."""
    return (tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32) - peak) * sharpness


@triton.jit
def _masses(logits, V, peak, sharpness, floor, pivot, BLOCK: tl.constexpr):
    """Of the tokens from the floor up and above the pivot, in BLOCK lanes: token t is in lane t % BLOCK."""
    masses = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        s = _scores(logits, start + tl.arange(0, BLOCK), V, peak, sharpness)
        masses += tl.where((s >= floor) & (s > pivot), tl.exp(s), 0.0)
    return masses


@triton.jit
def _reached(weights, target, n, WIDE: tl.constexpr):
    """The first of n at which the sum of weights passes the target; the last that has any where none does, as rounding
    may put a target at the very end. And the sum before it."""
    sums = tl.cumsum(weights)
    some = weights > 0
    first = tl.min(tl.where((sums > target) & some, n, WIDE))
    place = tl.minimum(first, tl.max(tl.where(some, n, 0)))
    return place, tl.sum(tl.where(n == place, sums - weights, 0.0))


@triton.jit
def _kth(logits, V, peak, sharpness, k, BLOCK: tl.constexpr):
    """The score of the k-th likeliest, found by bisection: as integers, scores are ordered as they are."""
    low, high = tl.full((), -(2**31), tl.int64), tl.full((), 0, tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        counts = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            bits = _scores(logits, at, V, peak, sharpness).to(tl.int32, bitcast=True)
            key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
            counts += ((key >= middle) & (at < V)).to(tl.int32)
        enough = tl.sum(counts) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    bits = tl.cast(low, tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=["told"])
def _draw_kernel(
    logits, settings, seeds, rows, positions, ids, tokens, told, V, row_stride, ids_stride,
    SETTINGS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    row = tl.load(rows + place)
    temperature = tl.load(settings + row * SETTINGS)
    top_p = tl.load(settings + row * SETTINGS + 1)
    top_k = tl.load(settings + row * SETTINGS + 2).to(tl.int32)
    min_p = tl.load(settings + row * SETTINGS + 3)
    logits += place.to(tl.int64) * row_stride
    n = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    firsts = n
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + n, mask=start + n < V, other=float("-inf")).to(tl.float32)
        firsts = tl.where(x > peaks, start + n, firsts)
        peaks = tl.maximum(peaks, x)
    peak = tl.max(peaks)
    likeliest = tl.min(tl.where(peaks == peak, firsts, V - 1))
    chosen = likeliest
    if temperature > 0:
        sharpness = 1 / tl.maximum(temperature, 1e-20)
        floor = float("-inf")
        if top_k > 0:
            floor = _kth(logits, V, peak, sharpness, top_k, BLOCK)
        pivot = float("-inf")  # what is not above it has been ruled out
        masses = _masses(logits, V, peak, sharpness, floor, pivot, BLOCK)
        whole = tl.sum(masses)
        above = whole
        chosen = -1
        turn = tl.full((), 0, tl.int64)
        blocks = tl.arange(0, BLOCKS)
        while (chosen < 0) & (turn < 64):  # it has an end where logits are no numbers too
            target = _uniform(tl.load(seeds + row), tl.load(positions + place), turn) * above
            turn += 1
            lane, before = _reached(masses, target, n, BLOCK)
            s = _scores(logits, blocks * BLOCK + lane, V, peak, sharpness)
            weights = tl.where((s >= floor) & (s > pivot), tl.exp(s), 0.0)
            block, _ = _reached(weights, target - before, blocks, BLOCKS)
            pivot = tl.max(tl.where(blocks == block, s, float("-inf")))
            inside = tl.exp(pivot) >= min_p
            if (top_p < 1) | (not inside):
                masses = _masses(logits, V, peak, sharpness, floor, pivot, BLOCK)
                above = tl.sum(masses)
                inside = inside & ((above < top_p * whole) | (top_p >= 1))
            chosen = tl.where(inside, block * BLOCK + lane, -1)
        chosen = tl.where(chosen < 0, likeliest, chosen)
    chosen = chosen.to(tl.int64)
    tl.store(tokens + place, chosen)
    tl.store(told + place, chosen)
    tl.store(ids + row * ids_stride + tl.load(positions + place), chosen)


def draw(
    logits: Tensor, settings: Tensor, seeds: Tensor, rows: Tensor, positions: Tensor, ids: Tensor, told: Tensor,
    block: int = 16384,
) -> Tensor:  # fmt: skip
    """(S,) tokens, int64; the likeliest where the temperature is 0.

    logits: (S, V), any floating dtype. settings: (R, ...), by row: temperature, top_p, top_k, min_p, and others. seeds:
    (R,), int64. rows, positions: (S,), int64, of the tokens to come, which go there into ids (R, ...), and into told
    (S,), which may be the host's, pinned.
    """
    count, vocabulary = logits.shape
    tokens = rows.new_empty(count)
    block = min(block, max(16, triton.next_power_of_2(vocabulary)))
    _draw_kernel[(count,)](
        logits, settings, seeds, rows, positions, ids, tokens, told, vocabulary, logits.stride(0), ids.stride(0),
        settings.shape[1], block,
        triton.next_power_of_2(triton.cdiv(vocabulary, block)), num_warps=max(1, min(32, block // 512)),
    )  # fmt: skip
    return tokens
