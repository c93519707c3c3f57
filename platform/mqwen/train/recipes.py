"""Recipes: functions that return settings. The command line overrides them by dotted name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from mqwen.train.settings import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RunSettings,
    SettingsError,
)


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
            learning_rates={"visual.*": 1e-4, "visual.*position_embedding*": 1e-3},
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
        optimizer=OptimizerSettings(learning_rate=2e-3, learning_rates={"feature_proj.*": 1e-3}),
        parallel=ParallelSettings(workers=2, reshard_after_forward=False),
        steps=200,
    )


def sft_lora() -> RunSettings:
    """An adapter and the projector of Qwen v1 with CLIP-L; `--model.init-from` names the artifact."""
    return RunSettings(
        name="sft-lora",
        model=ModelSettings(lora=LoraSettings(r=128, alpha=32)),
        optimizer=OptimizerSettings(learning_rate=3e-5, learning_rates={"feature_proj.*": 1e-4}),
        parallel=ParallelSettings(gpus_per_worker=1),
    )


def sft_full() -> RunSettings:
    """All of Qwen v1 and the projector, not the vision tower; `--model.init-from` names the artifact."""
    return RunSettings(
        name="sft-full",
        optimizer=OptimizerSettings(learning_rate=1e-5, learning_rates={"feature_proj.*": 1e-4}, freeze=("visual.*",)),
        parallel=ParallelSettings(gpus_per_worker=1),
    )


RECIPES: dict[str, Callable[[], RunSettings]] = {
    "demo": demo,
    "demo-lora": demo_lora,
    "sft-lora": sft_lora,
    "sft-full": sft_full,
}


def recipe(name: str) -> RunSettings:
    """The recipe of that name; an unknown one is refused with the nearest right name."""
    if name in RECIPES:
        return RECIPES[name]()
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
    raise SettingsError(f"recipe {name!r} is unknown; did you mean {near[0]!r}? Recipes: {', '.join(RECIPES)}")
