"""Attention against the paged cache, in plain torch: blocks are gathered, the softmax is torch's.

Shapes: T tokens of a step, B sequences of a group, Q queries and K keys of each of them, H heads, D channels of a head.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from mqwen.engine.device import to_device

if TYPE_CHECKING:
    from mqwen.model import MQWenLMHeadModel

Ints = NDArray[np.int64]


class PagedCache:
    """Keys and values of all layers, in blocks of `size` positions; what a head has of a block lies side by side."""

    def __init__(self, layers: int, blocks: int, size: int, heads: int, channels: int, like: Tensor) -> None:
        self.size, self.heads = size, heads
        data = torch.zeros((layers, 2, blocks, heads, size, channels), dtype=like.dtype, device=like.device)
        self.layers = [(layer[0], layer[1]) for layer in data]  # (blocks, H, size, D)

    def pages(self, blocks: Tensor) -> Tensor:
        """(B * H * K / size,): where each head's part of the blocks (B, K / size) lies, for `gather`."""
        heads = torch.arange(self.heads, device=blocks.device).unsqueeze(1)
        return (blocks.unsqueeze(1) * self.heads + heads).flatten()

    def gather(self, paged: Tensor, pages: Tensor, rows: int) -> Tensor:
        """(rows, H, K, D), from the keys or values of a layer."""
        flat = paged.view(-1, self.size * paged.shape[3])
        return flat.index_select(0, pages).view(rows, self.heads, -1, paged.shape[3])


def cache_bytes(*, free: int, total: int, held: int, share: float) -> int:
    """0.8 of what a process may have of a GPU's memory, which leaves room for a step. held: by the model. share: of the
    GPU; others may be loading into the rest, so that what is free now is not ours alone."""
    return int(0.8 * max(0.0, min(free, share * total - held)))


def count_blocks(
    model: "MQWenLMHeadModel", size: int, max_length: int, rows: int, wanted: int | None, share: float = 1.0
) -> int:
    """Blocks of `size` positions that go into `wanted` bytes, no more than `rows` sequences of max_length can use.

    wanted None: on a GPU, of which this process has a `share`, what `cache_bytes` says; else 1 GiB, or one sequence's.

    Raises ValueError where not one block goes in.
    """
    config = model.config
    position = 2 * config.num_hidden_layers * config.hidden_size * model.transformer.wte.weight.element_size()
    if wanted is None and model.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(model.device)
        wanted = cache_bytes(free=free, total=total, held=torch.cuda.memory_reserved(model.device), share=share)
    elif wanted is None:
        wanted = max(1 << 30, max_length * position)
    per_row = -(-max_length // size)
    blocks = min(rows * per_row, wanted // (size * position))
    if blocks < 1:
        raise ValueError(f"kv_cache_bytes={wanted} is less than a block of {size} positions, {size * position} bytes")
    return blocks


@dataclass(frozen=True)
class Group:
    """Sequences with nearly as many queries each, so that one padded product serves them.

    queries: (B * Q,), places of the queries in the step, the last of a sequence repeated; None: the first B places.
    pages: see `PagedCache.pages`. mask: (B, 1, Q, K), 0 where a query sees a key, else -inf.
    """

    rows: int
    queries: Tensor | None
    pages: Tensor
    mask: Tensor


class PagedPlan:
    """What the model's blocks need of a step: see `mqwen.model.attention.AttentionPlan`.

    cos, sin: (1, T, D / 2). logn: (1, T) or None. slots: blocks (T,), and places in these (T,), of each token's key and
    value. back: places of the tokens in the padded output of all groups, or None where the one group has no padding.
    """

    def __init__(
        self, cache: PagedCache, rotary: tuple[Tensor, Tensor, Tensor | None], slots: tuple[Tensor, Tensor],
        groups: list[Group],
    ) -> None:  # fmt: skip
        self.cos, self.sin, self.logn = rotary
        self._cache, self._slots, self._groups = cache, slots, groups
        self.back: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """query, key, value: (1, T, H, D). Takes keys and values into the cache, then (1, T, H, D)."""
        keys, values = self._cache.layers[layer]
        keys.transpose(1, 2).index_put_(self._slots, key[0])
        values.transpose(1, 2).index_put_(self._slots, value[0])
        parts = [self._attend(query[0], keys, values, group) for group in self._groups]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (mixed if self.back is None else mixed.index_select(0, self.back)).unsqueeze(0)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, group: Group) -> Tensor:
        """(B * Q, H, D)."""
        q = query[: group.rows] if group.queries is None else query.index_select(0, group.queries)
        q = q.view(group.rows, -1, *q.shape[1:]).transpose(1, 2)
        k, v = (self._cache.gather(paged, group.pages, group.rows) for paged in (keys, values))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask).transpose(1, 2).flatten(0, 1)


def plan_step(
    cache: PagedCache,
    rotary: tuple[Tensor, Tensor, Tensor | None],
    tables: Tensor,
    token_rows: Tensor,
    positions: Tensor,
    starts: Ints,
    counts: Ints,
) -> PagedPlan:
    """tables: (rows, blocks of a row). token_rows, positions: (T,). starts, counts: each work's first position and
    how many; works of one position come first."""
    size, singles = cache.size, int((counts == 1).sum())
    slots = tables[token_rows, positions // size], positions % size
    groups = []
    if singles:
        rows, at = token_rows[:singles], positions[:singles].unsqueeze(1)
        groups.append(_group(cache, tables, rows, at, int(starts[:singles].max()) + 1, None))
    padded = singles
    firsts = np.cumsum(counts) - counts
    sizes = [int(count).bit_length() for count in counts]
    order = np.zeros(int(counts.sum()), np.int64)
    for length in sorted(set(sizes) - {1}):
        group = np.array([i for i, bits in enumerate(sizes) if bits == length])
        longest = int(counts[group].max())
        offsets = np.minimum(np.arange(longest), counts[group, None] - 1)
        queries, at = to_device(np.stack((firsts[group, None] + offsets, starts[group, None] + offsets)), tables.device)
        rows = token_rows[queries[:, 0]]
        longest_context = int((starts + counts)[group].max())
        groups.append(_group(cache, tables, rows, at, longest_context, queries.flatten()))
        for place, i in enumerate(group):
            first = padded + place * longest
            order[firsts[i] : firsts[i] + counts[i]] = np.arange(first, first + counts[i])
        padded += len(group) * longest
    plan = PagedPlan(cache, rotary, slots, groups)
    if len(counts) > singles:
        order[:singles] = np.arange(singles)
        plan.back = to_device(order, tables.device)
    return plan


def _group(cache: PagedCache, tables: Tensor, rows: Tensor, at: Tensor, context: int, queries: Tensor | None) -> Group:
    """rows: (B,). at: (B, Q), the queries' positions. context: positions of the longest."""
    blocks = -(-context // cache.size)
    keys = torch.arange(blocks * cache.size, device=at.device)
    mask = torch.zeros((*at.shape, len(keys)), dtype=cache.layers[0][0].dtype, device=at.device)
    mask.masked_fill_(keys > at.unsqueeze(2), -torch.inf)
    return Group(len(rows), queries, cache.pages(tables[rows, :blocks]), mask.unsqueeze(1))
