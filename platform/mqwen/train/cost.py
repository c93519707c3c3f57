"""What a row costs to train: the floating-point operations that its forward and backward pass execute.

A matrix of m weights takes 2m operations a position forwards, 2m for the gradient of its input and 2m for its own;
what is frozen has none of its own, and none is wanted of the input where nothing before it is trained. Attention takes
4 C a pair of positions, of which causal attention needs half (Kaplan et al., 2020; Chowdhery et al., 2022, appendix B).
What activation checkpointing computes again is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from mqwen.model import MQWenLMHeadModel
from mqwen.train.loop import Batch

ORDER = ("visual", "feature_proj", "transformer", "lm_head")  # in which a row goes through the model's parts


@dataclass(frozen=True)
class Cost:
    """Operations a position of the language model, a labelled position, a picture, and the square of a conversation's
    positions."""

    position: float
    supervised: float
    image: float
    square: float
    image_positions: int
    image_token_id: int

    def of(self, row: Batch) -> float:
        """The operations of a row; empty places are left out."""
        ids, segments = row.inputs["input_ids"].numpy(), row.inputs["segment_ids"].numpy()
        numbers = (segments + np.arange(len(segments))[:, None] * (segments.max() + 1))[segments > 0]
        sizes = 1 + (self.image_positions - 1) * (ids == self.image_token_id)
        lengths = np.bincount(numbers, sizes[segments > 0])
        return self.total(row.positions, row.supervised, row.images, float((lengths**2).sum()))

    def total(self, positions: float, supervised: float, images: float, squares: float) -> float:
        return self.position * positions + self.supervised * supervised + self.image * images + self.square * squares


def cost_of(model: MQWenLMHeadModel) -> Cost:
    """Of a model as it will be trained, with its adapter and what is frozen; it may be one without memory."""
    config, vision = model.config, model.config.vision_config
    patches = config.image_positions
    flows = False  # whether a gradient is wanted of what the modules so far give
    found = dict.fromkeys(ORDER, 0.0)
    trained = dict.fromkeys(ORDER, False)
    for part in ORDER:
        for name, module in model.get_submodule(part).named_modules():
            if "original_module" in name:
                continue  # PEFT trains a copy
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                inputs = flows and isinstance(module, nn.Linear)  # the convolution's are pixels
                places = {"visual": patches + 1, "feature_proj": patches}.get(part, 1)
                places -= isinstance(module, nn.Conv2d)  # no class token yet
                found[part] += 2 * module.weight.numel() * places * (1 + inputs + module.weight.requires_grad)
            flows |= any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        trained[part] = flows
    seen = 4 * vision.hidden_size * (patches + 1) ** 2 * vision.num_hidden_layers
    heard = 2 * config.hidden_size * config.num_hidden_layers
    return Cost(
        position=found["transformer"],
        supervised=found["lm_head"],
        image=found["visual"] + found["feature_proj"] + seen * (1 + 2 * trained["visual"]),
        square=heard * (1 + 2 * trained["transformer"]),
        image_positions=patches,
        image_token_id=config.image_token_id,
    )
