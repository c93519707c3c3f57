"""Where a position stands: rotary angles, the base that grows with the sequence, and the logn factor of queries.

Shapes: B rows, L positions, D rotated channels of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ntk_alpha(lengths: Tensor, seq_length: int) -> Tensor:
    """Factor of the rotary base for sequences of `lengths` positions, same shape, float32.

    Dynamic NTK as Qwen v1 has it: max(1, 2^ceil(log2(n / seq_length) + 1) - 1), that is 1 up to seq_length, 3 up to
    twice, 7 up to four times. Computed on integers, where powers of two are exact.
    """
    times = (lengths + seq_length - 1) // seq_length
    doublings = torch.frexp((times - 1).clamp(min=0).float()).exponent  # the bit length of times - 1
    return 2.0 ** (doublings.float() + 1) - 1


def rotary_tables(positions: Tensor, alpha: Tensor | None, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each (B, L, D / 2), float32 whatever the model's dtype.

    Args:
        positions: (B, L) or (1, L), integers, from 0 in each sequence.
        alpha: None for 1, or (B, 1) or (B, L): the base becomes base * alpha^(D / (D - 2)) (NTK-aware scaling).
        dim: D.
        base: rotary_emb_base.

    Angles are position * base^(-2i / D) (Su et al., RoFormer, 2021, section 3.2.2).
    """
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    if alpha is None:
        frequencies = base**-exponents
    else:
        frequencies = (base * alpha.double() ** (dim / (dim - 2))).unsqueeze(-1) ** -exponents
    angles = positions.unsqueeze(-1).float() * frequencies.float()
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first channels of each head of `x` (..., head channels), pairing channel i with i + D / 2.

    The rotation is done in float32 and cast back. cos and sin must broadcast against (..., D / 2); channels beyond D
    (rotary_pct < 1) pass unrotated.
    """
    half = cos.shape[-1]
    # The backward pass of unbind is one stack, that of slices are zeros to add to.
    first, second = x[..., : 2 * half].unflatten(-1, (2, half)).float().unbind(-2)
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-2).type_as(x)
    return rotated if x.shape[-1] == 2 * half else torch.cat((rotated, x[..., 2 * half :]), dim=-1)


def logn_factors(positions: Tensor, seq_length: int) -> Tensor:
    """Factor of the query at each position, same shape, float32: max(1, log(position + 1) / log(seq_length)).

    Entropy-invariant attention (Su, 2021, "attention scale operation from entropy invariance"), as Qwen v1 uses it in
    eval mode. Positions count the sequence's own tokens, so padding does not change it.
    """
    return ((positions + 1).float().log() / math.log(seq_length)).clamp(min=1.0)
