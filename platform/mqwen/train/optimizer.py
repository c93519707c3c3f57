"""Which weights are trained, how fast, and the schedule of the learning rate."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

from torch import nn

from mqwen.train.settings import OptimizerSettings, SettingsError


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Parameters whose names match a pattern (as `visual.*`) take no gradient. One that matches nothing is an error."""
    for pattern in patterns:
        matched = [p for name, p in model.named_parameters() if fnmatch.fnmatch(name, pattern)]
        if not matched:
            tops = ", ".join(f"{name}.*" for name, _ in model.named_children())
            raise SettingsError(f"--optimizer.freeze {pattern!r} matches no parameter; the model has {tops}")
        for parameter in matched:
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Trained parameters by learning rate and weight decay; biases and norms (one dimension) are not decayed."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        projector = name.startswith("feature_proj.") and settings.projector_learning_rate is not None
        rate = settings.projector_learning_rate if projector else settings.learning_rate
        assert rate is not None
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "base_lr": rate, "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise SettingsError(f"--optimizer.freeze {' '.join(settings.freeze)} leaves nothing to train")
    return list(groups.values())


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """What step `step` (from 0) of `steps` multiplies the learning rate with: linear warm-up, then cosine to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
