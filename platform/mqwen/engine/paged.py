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
        self._gathered = [data.new_empty(0), data.new_empty(0)]

    def pages(self, blocks: Tensor) -> Tensor:
        """(B * H * K / size,): where each head's part of the blocks (B, K / size) lies, for `gather`."""
        heads = torch.arange(self.heads, device=blocks.device).unsqueeze(1)
        return (blocks.unsqueeze(1) * self.heads + heads).flatten()

    def gather(self, layer: int, pages: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (rows, H, K, D) each, good until the next call.

        They go into the same memory again and again: the C library gives large pieces that are free back to the system,
        and to get them anew each time costs ten times what the copy does.
        """
        found = []
        for number, paged in enumerate(self.layers[layer]):
            flat = paged.view(-1, self.size * paged.shape[3])
            if len(self._gathered[number]) < len(pages):
                self._gathered[number] = flat.new_empty(len(pages), flat.shape[1])
            into = self._gathered[number][: len(pages)]
            torch.index_select(flat, 0, pages, out=into)
            found.append(into.view(rows, self.heads, -1, paged.shape[3]))
        return found[0], found[1]


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
    """Sequences with nearly as many queries and keys each, so that one padded product serves them.

    queries: (B * Q,), places of the queries in the step, the last of a sequence repeated; None: all, as they come.
    pages: see `PagedCache.pages`. mask: (B, 1, Q, K), 0 where a query sees a key, else -inf.
    """

    rows: int
    queries: Tensor | None
    pages: Tensor
    mask: Tensor


class PagedPlan:
    """What the model's blocks need of a step: see `mqwen.model.attention.AttentionPlan`.

    cos, sin: (1, T, D / 2). logn: (1, T) or None. slots: blocks (T,), and places in these (T,), of each token's key and
    value. back: (T,), places of the tokens in the padded output of all groups; None: they are as they came.
    """

    def __init__(
        self, cache: PagedCache, rotary: tuple[Tensor, Tensor, Tensor | None], slots: tuple[Tensor, Tensor],
        groups: list[Group], back: Tensor | None,
    ) -> None:  # fmt: skip
        self.cos, self.sin, self.logn = rotary
        self._cache, self._slots, self._groups, self._back = cache, slots, groups, back

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """query, key, value: (1, T, H, D). Takes keys and values into the cache, then (1, T, H, D)."""
        keys, values = self._cache.layers[layer]
        keys.transpose(1, 2).index_put_(self._slots, key[0])
        values.transpose(1, 2).index_put_(self._slots, value[0])
        parts = [self._attend(query[0], layer, group) for group in self._groups]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (mixed if self._back is None else mixed.index_select(0, self._back)).unsqueeze(0)

    def _attend(self, query: Tensor, layer: int, group: Group) -> Tensor:
        """(B * Q, H, D)."""
        q = query if group.queries is None else query.index_select(0, group.queries)
        q = q.view(group.rows, -1, *q.shape[1:]).transpose(1, 2)
        k, v = self._cache.gather(layer, group.pages, group.rows)
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
    how many."""
    slots = tables[token_rows, positions // cache.size], positions % cache.size
    firsts, stops = np.cumsum(counts) - counts, starts + counts
    blocks = -(-stops // cache.size)
    # Padding at most doubles what a sequence has, of queries and of keys.
    sizes = [
        (count.bit_length(), keys.bit_length()) for count, keys in zip(counts.tolist(), blocks.tolist(), strict=True)
    ]
    kinds = sorted(set(sizes))
    if len(kinds) == 1 and (counts == counts[0]).all():
        at = positions.view(len(counts), -1)
        return PagedPlan(
            cache, rotary, slots, [_group(cache, tables, token_rows.view_as(at)[:, 0], at, blocks, None)], None
        )
    groups, padded = [], 0
    back = np.empty(int(counts.sum()), np.int64)
    for kind in kinds:
        members = np.array([i for i, size in enumerate(sizes) if size == kind])
        offsets = np.minimum(np.arange(counts[members].max()), counts[members, None] - 1)
        places = firsts[members, None] + offsets
        back[places] = np.arange(padded, padded + places.size).reshape(places.shape)
        padded += places.size
        queries = to_device(places, tables.device)
        rows, at = token_rows[queries[:, 0]], positions[queries]
        groups.append(_group(cache, tables, rows, at, blocks[members], queries.flatten()))
    return PagedPlan(cache, rotary, slots, groups, to_device(back, tables.device))


def _group(cache: PagedCache, tables: Tensor, rows: Tensor, at: Tensor, blocks: Ints, queries: Tensor | None) -> Group:
    """rows: (B,). at: (B, Q), the queries' positions. blocks: (B,), how many each has."""
    most = int(blocks.max())
    keys = torch.arange(most * cache.size, device=at.device)
    mask = torch.zeros((*at.shape, len(keys)), dtype=cache.layers[0][0].dtype, device=at.device)
    mask.masked_fill_(keys > at.unsqueeze(2), -torch.inf)
    return Group(len(rows), queries, cache.pages(tables[rows, :most]), mask.unsqueeze(1))
