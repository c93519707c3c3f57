"""One decode step of the whole network over the paged cache, as few kernels, replayed as a CUDA graph.

Shapes: M rows (one new position each), C hidden channels, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqwen.engine.cuda.kernels import Scratch, add_norm, angles, attend, gated_product, product, rows_product, silu_mul
from mqwen.model import MQWenLMHeadModel


class Layer:
    """A block's weights. w1 and w2 become views of one matrix: many rows multiply both at once."""

    def __init__(self, block: torch.nn.Module) -> None:
        self.norm_1, self.norm_2 = block.ln_1.weight.data, block.ln_2.weight.data
        self.qkv, self.qkv_bias = block.attn.c_attn.weight.data, block.attn.c_attn.bias.data
        self.mixed = block.attn.c_proj.weight.data
        self.both = torch.cat((block.mlp.w1.weight.data, block.mlp.w2.weight.data))
        self.up, self.gate = self.both.chunk(2)
        block.mlp.w1.weight.data, block.mlp.w2.weight.data = self.up, self.gate
        self.down = block.mlp.c_proj.weight.data


class Decoder:
    """Logits of the next position for up to `rows` sequences at once.

    keys, values: (layers, blocks, H, S, D).
    """

    def __init__(self, model: MQWenLMHeadModel, keys: Tensor, values: Tensor) -> None:
        self.layers = [Layer(block) for block in model.transformer.h]
        self.embedding, self.head = model.transformer.wte.weight.data, model.lm_head.weight.data
        self.norm, self.eps = model.transformer.ln_f.weight.data, model.config.layer_norm_epsilon
        self.keys, self.values = keys, values

    def forward(
        self, ids: Tensor, positions: Tensor, tables: Tensor, bases: Tensor, logn: Tensor, cfg: dict
    ) -> Tensor:
        """ids, positions: (M,), int32. tables: (M, blocks), int32. bases: (M,), float64. logn: (M,), float32.

        Returns:
            (M, V), float32 for few rows, else the weights' dtype.
        """
        rows = ids.shape[0]
        x = F.embedding(ids, self.embedding)
        _, _, heads, _, channels = self.keys.shape
        cos, sin = x.new_empty(2, rows, channels // 2, dtype=torch.float32)
        angles(positions, bases, cos, sin)
        scratch = Scratch(rows, heads, channels, cfg["splits"], x.device)
        place = (cos, sin, logn)
        body = {"one": self._one, "few": self._few, "many": self._many}[cfg["body"]]
        return body(x, place, tables, positions, scratch, cfg)

    def _one(self, x, place, tables, positions, scratch, cfg) -> Tensor:  # type: ignore[no-untyped-def]
        """The norm is part of the product that follows, and products add to the residual stream."""
        rows, pdl = x.shape[0], cfg["overlap"]
        first = self.layers[0]
        qkv, mixed = x.new_empty(rows, first.qkv.shape[0]), torch.empty_like(x)
        wide = x.new_empty(rows, first.up.shape[0])
        def t(name):
            n, k, w = cfg[name]
            return dict(block_n=n, block_k=k, warps=w, overlap=pdl)
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            product(x, layer.qkv, qkv, bias=layer.qkv_bias, gain=layer.norm_1, eps=self.eps, **t("qkv"))
            attend(qkv, *place, keys, values, tables, positions, mixed, scratch, *cfg["attend"], overlap=pdl)
            x = product(mixed, layer.mixed, torch.empty_like(x), residual=x, **t("o"))
            gated_product(x, layer.up, layer.gate, layer.norm_2, wide, self.eps, **t("gate"))
            x = product(wide, layer.down, torch.empty_like(x), residual=x, **t("down"))
        logits = torch.empty(rows, self.head.shape[0], dtype=torch.float32, device=x.device)
        return product(x, self.head, logits, gain=self.norm, eps=self.eps, **t("head"))

    def _few(self, x, place, tables, positions, scratch, cfg) -> Tensor:  # type: ignore[no-untyped-def]
        rows, pdl = x.shape[0], cfg["overlap"]
        first = self.layers[0]
        qkv, mixed, normed = x.new_empty(rows, first.qkv.shape[0]), torch.empty_like(x), torch.empty_like(x)
        wide = x.new_empty(rows, first.up.shape[0])
        def t(name):
            n, k, w, st = cfg[name]
            return dict(block_n=n, block_k=k, warps=w, stages=st, overlap=pdl)
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            add_norm(x, None, layer.norm_1, normed, self.eps, pdl)
            rows_product(normed, layer.qkv, qkv, bias=layer.qkv_bias, **t("qkv"))
            attend(qkv, *place, keys, values, tables, positions, mixed, scratch, *cfg["attend"], overlap=pdl)
            x = rows_product(mixed, layer.mixed, torch.empty_like(x), residual=x, **t("o"))
            add_norm(x, None, layer.norm_2, normed, self.eps, pdl)
            rows_product(normed, layer.up, wide, gate=layer.gate, **t("gate"))
            x = rows_product(wide, layer.down, torch.empty_like(x), residual=x, **t("down"))
        add_norm(x, None, self.norm, normed, self.eps, pdl)
        logits = torch.empty(rows, self.head.shape[0], dtype=torch.float32, device=x.device)
        return rows_product(normed, self.head, logits, **t("head"))

    def _many(self, x, place, tables, positions, scratch, cfg) -> Tensor:  # type: ignore[no-untyped-def]
        rows, pdl = x.shape[0], cfg["overlap"]
        normed, mixed = torch.empty_like(x), torch.empty_like(x)
        wide = x.new_empty(rows, self.layers[0].up.shape[0])
        add_norm(x, None, self.layers[0].norm_1, normed, self.eps)
        following = [layer.norm_1 for layer in self.layers[1:]] + [self.norm]
        for layer, keys, values, gain in zip(self.layers, self.keys, self.values, following, strict=True):
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias)
            attend(qkv, *place, keys, values, tables, positions, mixed, scratch, *cfg["attend"], overlap=pdl)
            add_norm(F.linear(mixed, layer.mixed), x, layer.norm_2, normed, self.eps, pdl)
            silu_mul(F.linear(normed, layer.both), wide)
            add_norm(F.linear(wide, layer.down), x, gain, normed, self.eps, pdl)
        return F.linear(normed, self.head)
