"""The language model's forward on a card: decoding over the paged cache, and prompts beside it.

Shapes: M sequences with one new position each, T tokens of prompts, C hidden channels, D channels of a head, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqwen.engine.cuda.kernels import Scratch, add_norm, attend, attend_prompts, begin, silu_mul, take_in
from mqwen.engine.cuda.products import gated_product, product, rows_product

if TYPE_CHECKING:
    from mqwen.model import MQWenLMHeadModel

OVERLAP = True  # of kernels between which none is cuBLAS's: see products.py

Tiles = dict[str, tuple[int, ...]]

# Measured on an H200 with Qwen-1.8B: outputs of a program, inputs of a step of it, warps, steps loaded ahead, and
# inputs whose weights are asked for before the kernel begins.
ONE: Tiles = {
    "qkv": (4, 1024, 4),
    "mixed": (8, 2048, 4),
    "gate": (2, 2048, 4),
    "down": (4, 2048, 8),
    "head": (2, 2048, 4),
}
FEW: Tiles = {
    "qkv": (32, 128, 4, 4, 256),
    "mixed": (16, 256, 2, 4, 256),
    "gate": (32, 128, 4, 4, 256),
    "down": (16, 256, 2, 5, 256),
    "head": (128, 128, 8, 3, 0),
}
SOME: Tiles = {
    "qkv": (32, 128, 4, 4, 0),
    "mixed": (16, 128, 4, 6, 256),
    "gate": (32, 64, 4, 6, 0),
    "down": (16, 128, 4, 10, 0),
    "head": (64, 64, 4, 6, 0),
}

Attention = Callable[[Tensor, int], Tensor]
"""Given queries, keys and values (rows, 3 C) of a layer, and its number: what the rows see, (rows, C)."""


def splits_for(rows: int) -> int:
    """Parts of a sequence that work at once, so that few sequences fill the card too."""
    return 14 if rows == 1 else 4 if rows <= 4 else 2 if rows <= 16 else 1


class Layer:
    """A block's weights. w1 and w2 become views of one matrix, so that one product has both."""

    def __init__(self, block: Any) -> None:
        self.norm_1, self.norm_2 = block.ln_1.weight.data, block.ln_2.weight.data
        self.qkv, self.bias = block.attn.c_attn.weight.data, block.attn.c_attn.bias.data
        self.mixed = block.attn.c_proj.weight.data
        self.both = torch.cat((block.mlp.w1.weight.data, block.mlp.w2.weight.data))
        self.up, self.gate = self.both.chunk(2)
        block.mlp.w1.weight.data, block.mlp.w2.weight.data = self.up, self.gate
        self.down = block.mlp.c_proj.weight.data
        self.width = len(self.up)


@dataclass(frozen=True)
class Tables:
    """What the engine knows of its running sequences, by row; see `mqwen.engine.runner`.

    ids, blocks: (rows, ...). places: (rows,), where a row's angles begin in rotary (angles, D). logn: by position, or
    None. size: positions of a block.
    """

    ids: Tensor
    blocks: Tensor
    places: Tensor
    rotary: Tensor
    logn: Tensor | None
    size: int


class Network:
    """cache: keys and values of each layer, (blocks, H, size, D) each."""

    layer: Any = Layer
    one = ONE

    def __init__(self, model: MQWenLMHeadModel, cache: list[tuple[Tensor, Tensor]], tables: Tables) -> None:
        self._layers = [self.layer(block) for block in model.transformer.h]
        self._embedding, self._head = model.transformer.wte.weight.data, model.lm_head.weight.data
        self._norm, self._eps = model.transformer.ln_f.weight.data, model.config.layer_norm_epsilon
        self._forbidden = model.config.image_token_id  # it would ask for a picture in the next step
        self._cache, self._tables = cache, tables

    def tiles_for(self, rows: int) -> Tiles | None:
        """Of products of our own; None where cuBLAS's are faster."""
        return FEW if rows <= 16 else SOME if 32 < rows <= 64 else None

    def decode(self, rows: Tensor, positions: Tensor, blocks: Tensor) -> Tensor:
        """Logits (M, V) after the tokens at `positions` of `rows`, which lie in `blocks`, (M,) each, int64."""
        t = self._tables
        x, turns = self.room(len(rows))
        begin(t.ids, t.places, t.rotary, rows, positions, self._embedding, x, turns, blocks, t.blocks, t.size)
        _, heads, _, channels = self._cache[0][0].shape
        scratch = Scratch(len(rows), heads, channels, splits_for(len(rows)), x.device)
        tiles = self.tiles_for(len(rows))
        settings = {"block": 64, "warps": 2, "stages": 2} if len(rows) <= 16 else {"block": 32, "warps": 1, "stages": 3}

        def attention(qkv: Tensor, layer: int) -> Tensor:
            keys, values = self._cache[layer]
            mixed, overlap = torch.empty_like(x), OVERLAP and tiles is not None
            return attend(
                qkv, turns, t.logn, keys, values, t.blocks, rows, positions, mixed, scratch, overlap, **settings,
            )  # fmt: skip

        if len(rows) == 1:
            return self._allowed(self._one(x, attention))
        if tiles is not None:
            return self._allowed(self._few(x, attention, tiles))
        return self._logits(self._many(x, attention))

    def room(self, tokens: int) -> tuple[Tensor, Tensor]:
        """For embeddings (T, C) and rotary factors (T, D)."""
        t = self._tables
        return self._embedding.new_empty(tokens, self._embedding.shape[1]), t.rotary.new_empty(
            tokens, t.rotary.shape[1]
        )

    def begin(self, rows: Tensor, positions: Tensor, x: Tensor, turns: Tensor) -> None:
        """Fills `room` for the tokens at `positions` of `rows`, (T,) each, int64."""
        t = self._tables
        begin(t.ids, t.places, t.rotary, rows, positions, self._embedding, x, turns)

    def prefill(self, x: Tensor, turns: Tensor, prompts: Prompts) -> Tensor:
        """Logits (P, V) after the last tokens. x, turns: as `begin` fills them; x, with pictures in it, is changed."""
        t = self._tables

        def attention(qkv: Tensor, layer: int) -> Tensor:
            keys, values = self._cache[layer]
            where = t.blocks, prompts.rows, prompts.positions
            query = take_in(qkv, turns, t.logn, keys, values, *where)
            return attend_prompts(query, keys, values, *where, prompts.tiles)

        return self._logits(self._many(x, attention, prompts.last))

    def _logits(self, normed: Tensor) -> Tensor:
        return self._allowed(F.linear(normed, self._head))

    def _allowed(self, logits: Tensor) -> Tensor:
        logits[:, self._forbidden] = -torch.inf
        return logits

    def _one(self, x: Tensor, attention: Attention) -> Tensor:
        """The norm is part of the product that follows, and each kernel reads its weights while its input is made."""

        def tile(name: str) -> dict[str, Any]:
            n, k, warps = self.one[name]
            return {"block_n": n, "block_k": k, "warps": warps, "overlap": OVERLAP}

        for place, layer in enumerate(self._layers):
            qkv = x.new_empty(1, len(layer.bias))
            product(x, layer.qkv, qkv, bias=layer.bias, gain=layer.norm_1, eps=self._eps, **tile("qkv"))
            mixed = attention(qkv, place)
            x = product(mixed, layer.mixed, torch.empty_like(x), residual=x, **tile("mixed"))
            wide = x.new_empty(1, layer.width)
            gated_product(x, layer.up, layer.gate, layer.norm_2, wide, self._eps, **tile("gate"))
            x = product(wide, layer.down, torch.empty_like(x), residual=x, **tile("down"))
        logits = x.new_empty(1, len(self._head))
        return product(x, self._head, logits, gain=self._norm, eps=self._eps, **tile("head"))

    def _few(self, x: Tensor, attention: Attention, tiles: Tiles) -> Tensor:
        rows = len(x)

        def tile(name: str) -> dict[str, Any]:
            names = "block_n", "block_k", "warps", "stages", "ahead"
            return dict(zip(names, tiles[name], strict=True), overlap=OVERLAP)

        for place, layer in enumerate(self._layers):
            normed = add_norm(x, None, layer.norm_1, torch.empty_like(x), self._eps, OVERLAP)
            qkv = rows_product(normed, layer.qkv, x.new_empty(rows, len(layer.bias)), bias=layer.bias, **tile("qkv"))
            mixed = attention(qkv, place)
            x = rows_product(mixed, layer.mixed, torch.empty_like(x), residual=x, **tile("mixed"))
            normed = add_norm(x, None, layer.norm_2, normed, self._eps, OVERLAP)
            wide = rows_product(normed, layer.up, x.new_empty(rows, layer.width), gate=layer.gate, **tile("gate"))
            x = rows_product(wide, layer.down, torch.empty_like(x), residual=x, **tile("down"))
        normed = add_norm(x, None, self._norm, torch.empty_like(x), self._eps, OVERLAP)
        return rows_product(normed, self._head, x.new_empty(rows, len(self._head)), **tile("head"))

    def _many(self, x: Tensor, attention: Attention, last: Tensor | None = None) -> Tensor:
        """(tokens, C), after the last norm; of the tokens `last` where these are given. x is changed."""
        normed = add_norm(x, None, self._layers[0].norm_1, torch.empty_like(x), self._eps)
        following = [layer.norm_1 for layer in self._layers[1:]] + [self._norm]
        for place, (layer, gain) in enumerate(zip(self._layers, following, strict=True)):
            mixed = attention(F.linear(normed, layer.qkv, layer.bias), place)
            if last is not None and gain is self._norm:  # nothing needs more of the others than keys and values
                mixed, x, normed = mixed[last], x[last], normed[: len(last)]
            add_norm(x.addmm_(mixed, layer.mixed.t()), None, layer.norm_2, normed, self._eps)
            wide = silu_mul(F.linear(normed, layer.both), x.new_empty(len(x), layer.width))
            add_norm(x.addmm_(wide, layer.down.t()), None, gain, normed, self._eps)
        return normed


@dataclass(frozen=True)
class Prompts:
    """Pieces of prompts, one after the other; what is before each is in the cache. All int64.

    rows, positions: (T,), of the tokens. tiles: (2, N), see `attend_prompts`. last: (P,), tokens that another follows.
    """

    rows: Tensor
    positions: Tensor
    tiles: Tensor
    last: Tensor
