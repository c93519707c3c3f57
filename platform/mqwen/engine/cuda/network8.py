"""The language model's forward with blocks in 8 bits, on a card: see network.py and mqwen.engine.float8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqwen.engine.cuda import network
from mqwen.engine.cuda.kernels import add_norm, silu_mul
from mqwen.engine.cuda.network import Attention, Network, Tables, Tiles
from mqwen.engine.cuda.products import Weight8, rows_product
from mqwen.engine.cuda.products8 import many_product

if TYPE_CHECKING:
    from mqwen.model import MQWenLMHeadModel

# Outputs of a program, inputs of a step of it, warps, and steps loaded ahead.
TILES: Tiles = {"qkv": (32, 256, 4, 4), "mixed": (16, 512, 4, 4), "gate": (32, 256, 4, 4), "down": (16, 512, 4, 4)}


class Layer:
    """A block's weights. w1 and w2 become views of one matrix, so that one product has both."""

    def __init__(self, block: Any) -> None:
        w1, w2 = block.mlp.w1, block.mlp.w2
        both = torch.cat((w1.weight.data.view(torch.uint8), w2.weight.data.view(torch.uint8))).view(w1.weight.dtype)
        w1.weight.data, w2.weight.data = both.chunk(2)
        self.both: Weight8 = both, torch.cat((w1.scale, w2.scale))
        self.norm_1, self.norm_2 = block.ln_1.weight.data, block.ln_2.weight.data
        self.bias = block.attn.c_attn.bias.data
        layers = block.attn.c_attn, block.attn.c_proj, w1, w2, block.mlp.c_proj
        self.qkv, self.mixed, self.up, self.gate, self.down = ((one.weight.data, one.scale) for one in layers)


class Float8Network(Network):
    """Few rows multiply as they are, more of them in 8 bits."""

    def __init__(self, model: MQWenLMHeadModel, cache: list[tuple[Tensor, Tensor]], tables: Tables) -> None:
        super().__init__(model, cache, tables)
        self._layers: Any = [Layer(block) for block in model.transformer.h]

    def _one(self, x: Tensor, attention: Attention) -> Tensor:
        return self._few(x, attention, TILES)

    def tiles_for(self, rows: int) -> Tiles | None:
        return TILES if rows <= 16 else None

    def _few(self, x: Tensor, attention: Attention, tiles: Tiles) -> Tensor:
        rows, overlap = len(x), network.OVERLAP

        def tile(name: str) -> dict[str, Any]:
            return dict(zip(("block_n", "block_k", "warps", "stages"), tiles[name], strict=True), overlap=overlap)

        normed = torch.empty_like(x)
        for place, layer in enumerate(self._layers):
            add_norm(x, None, layer.norm_1, normed, self._eps, overlap)
            qkv = rows_product(normed, layer.qkv, x.new_empty(rows, len(layer.bias)), bias=layer.bias, **tile("qkv"))
            mixed = attention(qkv, place)
            x = rows_product(mixed, layer.mixed, torch.empty_like(x), residual=x, **tile("mixed"))
            normed = add_norm(x, None, layer.norm_2, torch.empty_like(x), self._eps, overlap)
            wide = x.new_empty(rows, len(layer.up[0]))
            rows_product(normed, layer.up, wide, gate=layer.gate, **tile("gate"))
            x = rows_product(wide, layer.down, torch.empty_like(x), residual=x, **tile("down"))
        return F.linear(add_norm(x, None, self._norm, normed, self._eps, overlap), self._head)

    def _many(self, x: Tensor, attention: Attention, last: Tensor | None = None) -> Tensor:
        normed = add_norm(x, None, self._layers[0].norm_1, torch.empty_like(x), self._eps)
        following = [layer.norm_1 for layer in self._layers[1:]] + [self._norm]
        for place, (layer, gain) in enumerate(zip(self._layers, following, strict=True)):
            mixed = attention(many_product(normed, layer.qkv, layer.bias), place)
            if last is not None and gain is self._norm:  # nothing needs more of the others than keys and values
                mixed, x, normed = mixed[last], x[last], normed[: len(last)]
            add_norm(many_product(mixed, layer.mixed), x, layer.norm_2, normed, self._eps)
            wide = silu_mul(many_product(normed, layer.both), x.new_empty(len(x), len(layer.up[0])))
            add_norm(many_product(wide, layer.down), x, gain, normed, self._eps)
        return normed
