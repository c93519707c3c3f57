"""The language model's forward with blocks in 8 bits, on a card: see network.py and mqwen.engine.float8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mqwen.engine.cuda.kernels import add_norm, silu_mul
from mqwen.engine.cuda.network import FEW, ONE, Attention, Network, Tiles
from mqwen.engine.cuda.products import Weight8
from mqwen.engine.cuda.products8 import many_product

# Measured on an H200 with Qwen-1.8B; the head is in 16 bits: see network.py.
ONE8: Tiles = ONE | {"qkv": (8, 2048, 4), "mixed": (4, 2048, 8), "gate": (8, 2048, 4), "down": (8, 2048, 8)}
FEW8: Tiles = FEW | {
    "qkv": (32, 256, 2, 5, 0),
    "mixed": (32, 256, 4, 3, 0),
    "gate": (32, 256, 2, 3, 0),
    "down": (32, 256, 4, 3, 0),
}


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
        self.width = len(w1.scale)


class Float8Network(Network):
    """Few rows multiply as they are, more of them in 8 bits."""

    layer = Layer
    one = ONE8

    def tiles_for(self, rows: int) -> Tiles | None:
        return FEW8 if rows <= 16 else None

    def _many(self, x: Tensor, attention: Attention, last: Tensor | None = None) -> Tensor:
        normed = add_norm(x, None, self._layers[0].norm_1, torch.empty_like(x), self._eps)
        following = [layer.norm_1 for layer in self._layers[1:]] + [self._norm]
        for place, (layer, gain) in enumerate(zip(self._layers, following, strict=True)):
            mixed = attention(many_product(normed, layer.qkv, layer.bias), place)
            if last is not None and gain is self._norm:  # nothing needs more of the others than keys and values
                mixed, x, normed = mixed[last], x[last], normed[: len(last)]
            add_norm(many_product(mixed, layer.mixed), x, layer.norm_2, normed, self._eps)
            wide = silu_mul(many_product(normed, layer.both), x.new_empty(len(x), layer.width))
            add_norm(many_product(wide, layer.down), x, gain, normed, self._eps)
        return normed
