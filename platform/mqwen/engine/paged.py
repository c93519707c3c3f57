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
    """Keys and values of all layers, in blocks of `size` positions."""

    def __init__(self, layers: int, blocks: int, size: int, heads: int, channels: int, like: Tensor) -> None:
        self.size = size
        data = torch.zeros((layers, 2, blocks * size, heads, channels), dtype=like.dtype, device=like.device)
        self.layers = [(layer[0], layer[1]) for layer in data]  # (positions of all blocks, H, D)

    def gather(self, flat: Tensor, blocks: Tensor, rows: int) -> Tensor:
        """(rows, H, K, D): the blocks (rows * K / size,) one after the other."""
        paged = flat.view(-1, self.size * flat.shape[1] * flat.shape[2])
        return paged.index_select(0, blocks).view(rows, -1, *flat.shape[1:]).transpose(1, 2)


def count_blocks(model: "MQWenLMHeadModel", size: int, max_length: int, rows: int, wanted: int | None) -> int:
    """Blocks of `size` positions that go into `wanted` bytes, no more than `rows` sequences of max_length can use.

    wanted None: on a GPU 0.8 of the memory that is free, which leaves room for a step; else 1 GiB, or one sequence's.

    Raises ValueError where not one block goes in.
    """
    config = model.config
    position = 2 * config.num_hidden_layers * config.hidden_size * model.transformer.wte.weight.element_size()
    if wanted is None and model.device.type == "cuda":
        wanted = int(0.8 * torch.cuda.mem_get_info(model.device)[0])
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
    blocks: (B * K / size,). mask: (B, 1, Q, K), 0 where a query sees a key, else -inf.
    """

    rows: int
    queries: Tensor | None
    blocks: Tensor
    mask: Tensor


class PagedPlan:
    """What the model's blocks need of a step: see `mqwen.model.attention.AttentionPlan`.

    cos, sin: (1, T, D / 2). logn: (1, T) or None. slots: (T,), where each token's key and value go. back: places of
    the tokens in the padded output of all groups, or None where the one group has no padding.
    """

    def __init__(
        self, cache: PagedCache, rotary: tuple[Tensor, Tensor, Tensor | None], slots: Tensor, groups: list[Group]
    ) -> None:
        self.cos, self.sin, self.logn = rotary
        self._cache, self._slots, self._groups = cache, slots, groups
        self.back: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """query, key, value: (1, T, H, D). Takes keys and values into the cache, then (1, T, H, D)."""
        keys, values = self._cache.layers[layer]
        keys.index_copy_(0, self._slots, key[0])
        values.index_copy_(0, self._slots, value[0])
        parts = [self._attend(query[0], keys, values, group) for group in self._groups]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (mixed if self.back is None else mixed.index_select(0, self.back)).unsqueeze(0)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, group: Group) -> Tensor:
        """(B * Q, H, D)."""
        q = query[: group.rows] if group.queries is None else query.index_select(0, group.queries)
        q = q.view(group.rows, -1, *q.shape[1:]).transpose(1, 2)
        k, v = (self._cache.gather(flat, group.blocks, group.rows) for flat in (keys, values))
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
    slots = tables[token_rows, positions // size] * size + positions % size
    groups, back = [], [np.arange(singles)]
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
        order[:singles] = back[0]
        plan.back = to_device(order, tables.device)
    return plan


def _group(cache: PagedCache, tables: Tensor, rows: Tensor, at: Tensor, context: int, queries: Tensor | None) -> Group:
    """rows: (B,). at: (B, Q), the queries' positions. context: positions of the longest."""
    blocks = -(-context // cache.size)
    keys = torch.arange(blocks * cache.size, device=at.device)
    mask = torch.zeros((*at.shape, len(keys)), dtype=cache.layers[0][0].dtype, device=at.device)
    mask.masked_fill_(keys > at.unsqueeze(2), -torch.inf)
    return Group(len(rows), queries, tables[rows, :blocks].flatten(), mask.unsqueeze(1))
