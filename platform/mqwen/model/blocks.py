"""The modules that parameters live in, under the names of Qwen v1 and of CLIP.

Shapes: B rows, L positions, C hidden channels, H heads, D channels of a head, N pictures, P positions of a picture.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mqwen.model.attention import AttentionPlan
from mqwen.model.configuration import MQWenConfig
from mqwen.model.rotary import rotate


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, 2019): normalised in float32, scaled in x's dtype."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).type_as(x) * self.weight


class Attention(nn.Module):
    """Multi-head attention; c_attn is query, key and value in one, with a bias, c_proj has none."""

    def __init__(self, config: MQWenConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, plan: AttentionPlan) -> Tensor:
        rows, length, _ = hidden.shape
        query, key, value = self.c_attn(hidden).view(rows, length, 3, self.heads, -1).unbind(2)
        query, key = (rotate(x, plan.cos[:, :, None], plan.sin[:, :, None]) for x in (query, key))
        if plan.logn is not None:
            query = query * plan.logn[:, :, None, None].type_as(query)
        return self.c_proj(plan.attend(query, key, value, self.layer).reshape(rows, length, -1))


class MLP(nn.Module):
    """c_proj(w1(x) * silu(w2(x))): w2 is the gate (SwiGLU, Shazeer 2020). The width is intermediate_size / 2."""

    def __init__(self, config: MQWenConfig) -> None:
        super().__init__()
        width = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, width, bias=False)
        self.w2 = nn.Linear(config.hidden_size, width, bias=False)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class Block(nn.Module):
    """One layer: (B, L, C) to (B, L, C).

    Where transformers' `gradient_checkpointing_enable` has set `gradient_checkpointing`, what the backward pass needs
    is computed again there. That happens inside of forward, so that forward compiles with it, and what shards the
    block hooks on around it.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: MQWenConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config)
        # What 2 * layers projections add up in the residual stream starts at unit size (Radford et al., GPT-2, 2019).
        for projection in (self.attn.c_proj, self.mlp.c_proj):
            projection.init_std = config.initializer_range / (2 * config.num_hidden_layers) ** 0.5

    def forward(self, hidden: Tensor, plan: AttentionPlan) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self._layer, hidden, plan)
        return self._layer(hidden, plan)

    def _layer(self, hidden: Tensor, plan: AttentionPlan) -> Tensor:
        hidden = hidden + self.attn(self.ln_1(hidden), plan)
        return hidden + self.mlp(self.ln_2(hidden))


class VisionTower(nn.Module):
    """CLIP's vision tower, under its published names (visual.vision_model.*).

    Pictures (N, 3, H, W), normalised, become (N, P, vision channels): the last layer's patches, without the class
    token and without post_layernorm, which CLIP applies to the class token only.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.vision_model = CLIPVisionModel(config)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.vision_model(pixel_values=pictures).last_hidden_state[:, 1:]


class Projector(nn.Sequential):
    """Linear, GELU (the exact one), Linear: (N, P, vision channels) to (N, P, C)."""

    def __init__(self, config: MQWenConfig) -> None:
        first = nn.Linear(config.vision_config.hidden_size, config.hidden_size)
        second = nn.Linear(config.hidden_size, config.hidden_size)
        for linear in (first, second):
            linear.init_std = 0.01  # type: ignore[assignment]
        super().__init__(first, nn.GELU(), second)
