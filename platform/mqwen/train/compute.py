"""Memory and speed of a forward and a backward pass, applied to the model from outside, before it is sharded."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mqwen.model import MQWenLMHeadModel
from mqwen.train.float8 import use_float8
from mqwen.train.settings import ComputeSettings

_ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
}
_PRODUCTS = {"aten::mm": 1, "aten::addmm": 2, "aten::_scaled_mm": 1}  # and which argument is the second matrix


def prepare(model: MQWenLMHeadModel, settings: ComputeSettings, backend: str = "inductor") -> None:
    """Blocks, tower and head compute the same from now on, within rounding; with `float8` the blocks in 8 bits.

    What is compiled are the modules' forward methods, in place: names and state stay, and hooks run around them.
    `backend` is torch.compile's.
    """
    blocks: list[Any] = list(model.transformer.h)
    if settings.float8:
        use_float8(model)
    if settings.recompute != "nothing":
        again = partial(checkpoint, use_reentrant=False)
        if settings.recompute == "selective":
            kept = partial(_kept, widest=model.config.intermediate_size // 2)
            again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, kept))
        for block in blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = again
    if settings.compile:
        for block in blocks:
            # One graph for each layout of rows serves all blocks and all packings.
            block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
        for layer in model.visual.vision_model.encoder.layers:
            layer.forward = torch.compile(layer.forward, backend=backend)
    if model.device.type == "cuda":
        from mqwen.model.softmax_kernel import softmax_gradient_in_place  # Triton is not there without a GPU

        model.lm_head.kernel = softmax_gradient_in_place
    elif settings.compile:
        model.lm_head.kernel = torch.compile(model.lm_head.kernel, dynamic=True, backend=backend)


def _kept(_: Any, operation: Any, *arguments: Any, widest: int, **named: Any) -> CheckpointPolicy:
    """Attention costs much for little memory, and so do matrix products, but those into the MLP's width."""
    name = operation.name().partition(".")[0]
    if name in _ATTENTION or (name in _PRODUCTS and arguments[_PRODUCTS[name]].shape[1] < widest):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
