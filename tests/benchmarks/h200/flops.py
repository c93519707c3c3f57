"""Floating-point operations that a pass needs: products of matrices alone, recomputation not counted."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mqwen.model import MQWenConfig


def flops(model: nn.Module, config: MQWenConfig, runs: Iterable[int], supervised: int, images: int) -> float:
    """Of forward and backward pass.

    A weight costs two operations a position in each of three products: forward, gradient of its input, gradient of
    itself, which a frozen weight has not. The head runs for supervised positions only. Causal attention over a run of
    n costs 6 n^2 C a layer. A picture costs a forward pass of the tower over its patches and the class token.
    The projector is left out; it is under 0.5 %.
    """
    runs = list(runs)
    positions, channels, layers = sum(runs), config.hidden_size, config.num_hidden_layers
    trained = frozen = head = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or not (name.startswith("transformer.h.") or "lm_head" in name or ".h." in name):
            continue
        if "lm_head" in name:
            head += parameter.numel() * (6 if parameter.requires_grad else 4)
        elif parameter.requires_grad:
            trained += parameter.numel()
        else:
            frozen += parameter.numel()
    attention = 6.0 * layers * channels * sum(run * run for run in runs)
    return positions * (6.0 * trained + 4.0 * frozen) + supervised * float(head) + attention + images * tower(config)


def tower(config: MQWenConfig) -> float:
    """Of one picture's forward pass: 2 x weights x places, as the table of earlier measurements counts."""
    vision = config.vision_config
    h, w = vision.hidden_size, vision.intermediate_size
    weights = vision.num_hidden_layers * (4 * h * h + 2 * h * w) + 3 * h * vision.patch_size**2
    return 2.0 * weights * (config.image_positions + 1)
