"""Which layers can multiply in 8 bits, where a model is trained or served: the linear ones of the language model's
blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from mqwen.model.network import MQWenLMHeadModel

LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
MULTIPLE = 16  # what the products want of inputs and outputs


def float8_layers(model: MQWenLMHeadModel) -> list[nn.Linear]:
    """Without what an adapter adds to them. Raises ValueError where the model's sizes do not allow 8 bits."""
    layers: list[nn.Linear] = []
    for block in model.transformer.h:
        for name in LAYERS:
            found: Any = block.get_submodule(name)
            linear = getattr(found, "base_layer", found)  # under an adapter
            if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
                raise ValueError(
                    f"8 bits want layers of multiples of {MULTIPLE} channels; {name} has {linear.in_features} and "
                    f"{linear.out_features}"
                )
            layers.append(linear)
    return layers
