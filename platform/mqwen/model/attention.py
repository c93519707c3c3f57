"""Attention over rows of every layout, by the best kernel that the device, the dtype and the layout allow.

Shapes: B rows, L query positions, K key positions, H heads, D channels of a head.
"""

from __future__ import annotations

import inspect
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mqwen.model.cache import MQWenCache
from mqwen.model.rows import Expanded, Layout

# The flag for causal attention was renamed while varlen_attn was young; torch 2.13 has window_size.
CAUSAL: dict[str, Any] = (
    {"window_size": (-1, 0)} if "window_size" in inspect.signature(varlen_attn).parameters else {"is_causal": True}
)


class AttentionPlan:
    """What all layers of one forward share: rotary tables, logn factors, the cache, and who may see whom.

    The blocks need no more of a plan than `cos`, `sin`, `logn` and `attend`; the engine has a plan of its own.
    A plain object on purpose: FSDP's mixed precision casts the floating tensors among a block's arguments, and would
    turn the tables into bfloat16.

    Attributes:
        cos, sin: (B, L, D / 2) or (1, L, D / 2), float32.
        logn: (B, L) or (1, L), float32, factors of the queries; or None.
        cache: keys and values of earlier calls, grown by each layer; or None.
        causal: every place sees all places before it in its row, and nothing else must be kept from it.
        runs: lengths of the runs that the flattened (B * L) places fall into; places of one run see those before them.
        offsets: (number of runs + 1,), int32: where they begin and end, for the variable-length kernel.
        longest: positions of a row, which no run exceeds. It is the same for all packings, as compiled blocks want it.
        mask: (B or 1, 1, L, K), bool: True where a query may see a key.
    """

    def __init__(self, cos: Tensor, sin: Tensor, logn: Tensor | None, cache: MQWenCache | None = None) -> None:
        self.cos = cos
        self.sin = sin
        self.logn = logn
        self.cache = cache
        self.causal = False
        self.runs: list[int] | None = None
        self.offsets: Tensor | None = None
        self.longest = 0
        self.mask: Tensor | None = None

    def see(self, expanded: Expanded, past_length: int, key_mask: Tensor | None) -> None:
        """Decide who sees whom.

        Args:
            expanded: the rows of this call.
            past_length: places in the cache before this call.
            key_mask: (B, K), 1 where a key is a token, as the cache holds it after this call; None where all are.
        """
        length = expanded.ids.shape[1]
        segments = expanded.segments
        device = expanded.ids.device
        if past_length == 0:
            if expanded.layout in (Layout.FULL, Layout.PREFIX):
                self.causal = True  # padding at the end is seen by nothing that counts
                return
            assert segments is not None
            if expanded.layout is Layout.RUNS:
                assert expanded.runs is not None
                self.runs = expanded.runs
                offsets = torch.tensor([0, *accumulate(self.runs)], dtype=torch.int32)
                self.offsets = offsets.to(device, non_blocking=True)
                self.longest = length
                return
            keys = queries = segments
        else:
            if key_mask is None:
                if length > 1:
                    self.mask = _bottom_right(length, past_length + length, device)
                return
            keys = key_mask
            queries = key_mask[:, past_length:]
        # Equality also lets padding see padding: a query that sees nothing at all would give NaN.
        self.mask = (queries.unsqueeze(2) == keys.unsqueeze(1)).unsqueeze(1)
        if length > 1:
            self.mask = self.mask & _bottom_right(length, keys.shape[1], device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Softmax(q k^T / sqrt(D)) v over the keys that each query may see, those in the cache included.

        Args:
            query, key, value: (B, L, H, D), of the new places; query and key rotated.

        Returns:
            (B, L, H, D).
        """
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if self.cache is not None:
            k, v = self.cache.update(k, v, layer)
        if self.offsets is not None:  # nothing precedes then
            return _attend_runs(query, key, value, self)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal)
        return mixed.transpose(1, 2)


def _attend_runs(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """Runs that cannot see each other: one variable-length kernel; elsewhere run by run, or compiled, with a mask."""
    assert plan.offsets is not None
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        mixed = varlen_attn(q, k, v, plan.offsets, plan.offsets, plan.longest, plan.longest, **CAUSAL)
        assert isinstance(mixed, Tensor)
        return mixed.view_as(query)
    if torch.compiler.is_compiling():
        # Looking at the list of runs would compile the block again for every packing.
        places = torch.arange(query.shape[0] * query.shape[1], dtype=torch.int32, device=query.device)
        run = torch.searchsorted(plan.offsets, places, right=True).view(query.shape[:2])
        mask = (run.unsqueeze(2) == run.unsqueeze(1)).tril().unsqueeze(1)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    assert plan.runs is not None
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(plan.runs, dim=2) for x in (q, k, v)), strict=True)
    mixed = torch.cat([F.scaled_dot_product_attention(a, b, c, is_causal=True) for a, b, c in parts], dim=2)
    return mixed.squeeze(0).transpose(0, 1).reshape(query.shape)


def _bottom_right(queries: int, keys: int, device: torch.device) -> Tensor:
    """The last query sees all keys, each one before it one less: (queries, keys), bool."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
