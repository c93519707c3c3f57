"""A model's blocks in 8 bits: half the bytes to read and to hold, and products at twice the rate where the card has it.

Each output of a weight and each row of what it is multiplied with has a scale of its own; both are e4m3 (Micikevicius
et al., 2022). Embeddings, head and the picture path stay as they are.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mqwen.model.float8 import float8_layers

if TYPE_CHECKING:
    from mqwen.model import MQWenLMHeadModel

KIND = torch.float8_e4m3fn
MOST = torch.finfo(KIND).max


class Float8Linear(nn.Linear):
    """weight: (N, K), in 8 bits. scale: (N,), float32: what a row of it is to be multiplied by."""

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        rows, scales = in_8_bits(x.reshape(-1, x.shape[-1]))
        out = torch._scaled_mm(
            rows, self.weight.t(), scale_a=scales, scale_b=self.scale.view(1, -1), bias=self.bias, out_dtype=x.dtype
        )
        return out.view(*x.shape[:-1], -1)


def in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) in 8 bits, and each row's scale (M, 1), float32."""
    scales = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / MOST
    return (x.float() / scales).clamp(-MOST, MOST).to(KIND), scales


@torch.no_grad()
def to_float8(model: MQWenLMHeadModel) -> None:
    """In place; it takes back no step. Raises ValueError where the model's sizes do not allow it."""
    try:
        layers = float8_layers(model)
    except ValueError as error:
        raise ValueError(f"{error}: leave float8 out") from error
    for linear in layers:
        weight, scales = in_8_bits(linear.weight)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_buffer("scale", scales.flatten())
        linear.__class__ = Float8Linear


def is_float8(model: MQWenLMHeadModel) -> bool:
    first: Any = model.transformer.h[0]
    return isinstance(first.attn.c_attn, Float8Linear)
