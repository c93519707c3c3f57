"""Which weights are trained, how fast, and the schedule of the learning rate."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

from torch import nn

from mqwen.train.settings import OptimizerSettings, SettingsError


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Parameters whose names match a pattern take no gradient. Raises SettingsError where one matches nothing."""
    for pattern in patterns:
        for parameter in _matching(model, pattern, "--optimizer.freeze"):
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Trained parameters by learning rate and weight decay; biases and norms (one dimension) are not decayed.

    Raises SettingsError where a learning rate's pattern matches nothing that is trained, or nothing is left to train.
    """
    rates = dict.fromkeys(model.parameters(), settings.learning_rate)
    for pattern, rate in settings.learning_rates.items():
        matching = _matching(model, pattern, "--optimizer.learning-rates")
        if not any(parameter.requires_grad for parameter in matching):
            raise SettingsError(f"--optimizer.learning-rates {pattern!r} is for parameters that are frozen; drop it")
        rates |= dict.fromkeys(matching, rate)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter, rate in rates.items():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            group = groups.setdefault((rate, decay), {"params": [], "base_lr": rate, "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
    if not groups:
        raise SettingsError(f"--optimizer.freeze {' '.join(settings.freeze)} leaves nothing to train")
    return list(groups.values())


def _matching(model: nn.Module, pattern: str, option: str) -> list[nn.Parameter]:
    matching = [parameter for name, parameter in model.named_parameters() if fnmatch.fnmatch(name, pattern)]
    if not matching:
        parts = ", ".join(f"{name}.*" for name, _ in model.named_children())
        raise SettingsError(f"{option} {pattern!r} matches no parameter; the model has {parts}")
    return matching


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """What step `step` (from 0) of `steps` multiplies the learning rate with: linear warm-up, then cosine to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
