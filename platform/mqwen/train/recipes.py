"""Recipes: functions that return settings. The command line overrides them by dotted name.

align, sft-lora, sft-full and pretrain are for Qwen-1.8B with CLIP-L on one GPU; those that end in -7b are for Qwen-7B.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mqwen.train.settings import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RunSettings,
    SettingsError,
)

# What MQWenConfig's defaults, Qwen-1.8B with CLIP-L, do not say already.
QWEN_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 22016,
}
TOWER = "visual.*"
PROJECTOR = "feature_proj.*"


def demo() -> RunSettings:
    """A model of a million weights that reads handwritten digits, from scratch, in minutes on two cores."""
    vision = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    return RunSettings(
        name="demo",
        model=ModelSettings(
            config={
                "hidden_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "initializer_range": 0.07,
                "kv_channels": 32,
                "intermediate_size": 768,
                "seq_length": 256,
                "max_position_embeddings": 256,
                "vision_config": vision | {"image_size": 48, "patch_size": 16},
            }
        ),
        data=DataSettings(pack_length=256, packs_per_row=4, rows_per_step=2),
        optimizer=OptimizerSettings(
            learning_rate=1e-3,
            # At the language model's rate the tower never learns to tell digits apart; its few places may hurry.
            learning_rates={TOWER: 1e-4, "visual.*position_embedding*": 1e-3},
        ),
        parallel=ParallelSettings(workers=2, reshard_after_forward=False),
        steps=700,
    )


def demo_lora() -> RunSettings:
    """An adapter for the demo's artifact, on two cores; `--model.init-from` names it."""
    return RunSettings(
        name="demo-lora",
        model=ModelSettings(lora=LoraSettings(r=16)),
        data=DataSettings(pack_length=256, packs_per_row=4, rows_per_step=2),
        optimizer=OptimizerSettings(learning_rate=2e-3, learning_rates={PROJECTOR: 1e-3}),
        parallel=ParallelSettings(workers=2, reshard_after_forward=False),
        steps=200,
    )


def align() -> RunSettings:
    """The projector alone, between a tower and a language model that stay as they are, as LLaVA's first stage."""
    return RunSettings(
        name="align",
        model=ModelSettings(precision="bfloat16"),
        data=DataSettings(rows_per_step=64),
        optimizer=OptimizerSettings(
            learning_rate=1e-3, freeze=(TOWER, "transformer.*", "lm_head.*"), weight_decay=0.0, warmup=0.03
        ),
        parallel=ParallelSettings(gpus_per_worker=1),
    )


def sft_lora() -> RunSettings:
    """An adapter and the projector, with what the reference trains them with."""
    return RunSettings(
        name="sft-lora",
        model=ModelSettings(lora=LoraSettings(r=128, alpha=32), precision="bfloat16"),
        optimizer=OptimizerSettings(
            learning_rate=3e-5, learning_rates={PROJECTOR: 1e-4}, betas=(0.9, 0.999), schedule="linear", warmup=0.0
        ),
        parallel=ParallelSettings(gpus_per_worker=1),
    )


def sft_full() -> RunSettings:
    """All of the language model and the projector, not the vision tower."""
    return RunSettings(
        name="sft-full",
        model=ModelSettings(precision="bfloat16"),
        data=DataSettings(rows_per_step=32),
        optimizer=OptimizerSettings(learning_rate=1e-5, learning_rates={PROJECTOR: 1e-4}, freeze=(TOWER,), warmup=0.03),
        parallel=ParallelSettings(gpus_per_worker=1),
    )


def pretrain() -> RunSettings:
    """All parts from fresh weights; `--optimizer.freeze` leaves some as they are. The language model's rate is Qwen's
    (Bai et al., 2023, table 1)."""
    return RunSettings(
        name="pretrain",
        model=ModelSettings(precision="bfloat16"),
        data=DataSettings(rows_per_step=256),
        optimizer=OptimizerSettings(
            learning_rate=3e-4, learning_rates={TOWER: 1e-4}, weight_decay=0.1, schedule="wsd", warmup=0.01
        ),
        parallel=ParallelSettings(gpus_per_worker=1),
        steps=100_000,
    )


def _for_7b(recipe: Callable[[], RunSettings], workers: int) -> Callable[[], RunSettings]:
    """The recipe for Qwen-7B, on so many GPUs."""

    def larger() -> RunSettings:
        small = recipe()
        model = replace(small.model, config=QWEN_7B) if recipe is pretrain else small.model  # artifacts bring their own
        parallel = replace(small.parallel, workers=workers)
        return replace(small, name=f"{small.name}-7b", model=model, parallel=parallel)

    return larger


RECIPES: dict[str, Callable[[], RunSettings]] = {
    "demo": demo,
    "demo-lora": demo_lora,
    "align": align,
    "sft-lora": sft_lora,
    "sft-full": sft_full,
    "pretrain": pretrain,
    "align-7b": _for_7b(align, 1),
    "sft-lora-7b": _for_7b(sft_lora, 1),
    "sft-full-7b": _for_7b(sft_full, 8),
    "pretrain-7b": _for_7b(pretrain, 8),
}


def recipe(name: str) -> RunSettings:
    """The recipe of that name; an unknown one is refused with the nearest right name."""
    if name in RECIPES:
        return RECIPES[name]()
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
    raise SettingsError(f"recipe {name!r} is unknown; did you mean {near[0]!r}? Recipes: {', '.join(RECIPES)}")
