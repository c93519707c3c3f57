"""Linear layers whose three products run in 8 bits (Micikevicius et al., 2022): half the time of bfloat16's on a card.

Weights, optimizer and what goes between layers stay as they are. What goes into a product is scaled, as a whole and
anew each time, to the range of its 8 bits: activations and weights as e4m3, gradients, which spread wider, as e5m2.

Shapes: M places, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mqwen.model import MQWenLMHeadModel
from mqwen.model.float8 import float8_layers
from mqwen.train.settings import SettingsError

LEAST = (8, 9)  # compute capability of the first cards with 8 bits
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


class Float8Linear(nn.Linear):
    """An nn.Linear in all but how it multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        out = _Product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.weight.requires_grad)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """x (M, K) @ weight (N, K)^T. The backward pass scales again what the forward pass did: compiled, what is done
    twice so is done once, and torch.compile decides what is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, trained: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.trained = trained
        return product(scaled(x, FORWARD), scaled(weight, FORWARD), x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        given = scaled(gradient, BACKWARD)
        to_x = product(given, turned(scaled(weight, FORWARD)), x.dtype, fast=True)
        if not ctx.trained:
            return to_x, None, None
        # A sum over all places is long: it is added up in float32, where `fast` adds in fewer bits.
        return to_x, product(turned(given), turned(scaled(x, FORWARD)), weight.dtype, fast=False), None


Scaled = tuple[Tensor, Tensor]
"""A matrix in 8 bits, whose rows lie in one piece each, and the factor, float32, that gives it back."""


def product(a: Scaled, b: Scaled, dtype: torch.dtype, fast: bool) -> Tensor:
    """a (M, K) @ b (N, K)^T, (M, N). `fast` adds up in fewer bits than float32's."""
    return torch._scaled_mm(a[0], b[0].t(), scale_a=a[1], scale_b=b[1], out_dtype=dtype, use_fast_accum=fast)


def turned(x: Scaled) -> Scaled:
    """Transposed, in memory too: both matrices of a product lie along what is summed over."""
    return x[0].t().contiguous(), x[1]


def scaled(x: Tensor, kind: torch.dtype) -> Scaled:
    """The largest value of x becomes the largest of the 8 bits."""
    most = torch.finfo(kind).max
    factor = most / x.abs().max().float().clamp(min=1e-12)
    return (x.float() * factor).clamp(-most, most).to(kind).contiguous(), factor.reciprocal()


def use_float8(model: MQWenLMHeadModel) -> None:
    """The linear layers of the language model's blocks multiply in 8 bits from now on; an adapter's own do not.

    Names, parameters and state stay. Raises SettingsError where the card or the model's sizes do not allow it.
    """
    if model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) < LEAST:
        raise SettingsError(
            f"--compute.float8 wants a card with 8 bits, of compute capability {'.'.join(map(str, LEAST))} or more, as "
            f"L4, H100 or H200; {torch.cuda.get_device_name(model.device)} has none: leave it out"
        )
    try:
        layers = float8_layers(model)
    except ValueError as error:
        raise SettingsError(f"--compute.float8: {error}: leave it out") from error
    for linear in layers:
        linear.__class__ = Float8Linear
