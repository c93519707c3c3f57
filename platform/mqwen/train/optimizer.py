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
    """Trained parameters by the pattern that gives their learning rate ("" for none) and by weight decay; biases and
    norms (one dimension) are not decayed. Each group has beside torch's keys `base_lr` and `pattern`.

    Raises SettingsError where a learning rate's pattern matches nothing that is trained, or nothing is left to train.
    """
    patterns = dict.fromkeys(model.parameters(), "")
    for pattern in settings.learning_rates:
        matching = _matching(model, pattern, "--optimizer.learning-rates")
        if not any(parameter.requires_grad for parameter in matching):
            raise SettingsError(
                f"--optimizer.learning-rates {pattern!r} is for parameters that are frozen; give the option without it"
            )
        patterns |= dict.fromkeys(matching, pattern)
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for parameter, pattern in patterns.items():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            rate = settings.learning_rates.get(pattern, settings.learning_rate)
            new = {"params": [], "pattern": pattern, "base_lr": rate, "lr": rate, "weight_decay": decay}
            groups.setdefault((pattern, decay), new)["params"].append(parameter)
    if not groups:
        raise SettingsError(f"--optimizer.freeze {' '.join(settings.freeze)} leaves nothing to train")
    return list(groups.values())


def _matching(model: nn.Module, pattern: str, option: str) -> list[nn.Parameter]:
    matching = [parameter for name, parameter in model.named_parameters() if fnmatch.fnmatch(name, pattern)]
    if not matching:
        parts = ", ".join(f"{name}.*" for name, _ in model.named_children())
        raise SettingsError(f"{option} {pattern!r} matches no parameter; the model has {parts}")
    return matching


def rate_factor(before: float, after: float, settings: OptimizerSettings) -> float:
    """What a step multiplies the learning rates with, by the shares of the budget that are spent before and after it.

    The schedules are those of OptimizerSettings: the cosine is Loshchilov and Hutter's (2017), "wsd" that of Hu et al.
    (2024).
    """
    if before < settings.warmup:
        return min(1.0, after / settings.warmup)
    fallen = (before - settings.warmup) / (1 - settings.warmup)
    match settings.schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * fallen))
        case "linear":
            return 1 - fallen
        case "wsd":
            return min(1.0, (1 - before) / settings.cooldown) if settings.cooldown else 1.0
