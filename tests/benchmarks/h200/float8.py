"""Training in 8 bits beside bfloat16: the same steps from the same start on rows that can be learnt."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from mqwen.model import MQWenConfig
from mqwen.train.settings import ComputeSettings
from mqwen.train.strategy import make_strategy
from tests.benchmarks.h200.cases import Case, bare_loop, prepared, settings_of
from tests.benchmarks.h200.language import CHANCES, language_rows
from tests.benchmarks.h200.measure import synchronize
from tests.benchmarks.h200.rows import Shape

LAST = 20  # steps whose mean is the final loss
KINDS = {"bfloat16": False, "float8": True}


@dataclass
class Curves:
    """Of the runs by kind: losses of all steps, positions a second, bytes at most."""

    shape: Shape
    words: int
    losses: dict[str, list[float]] = field(default_factory=dict)
    positions_per_s: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def final(self) -> dict[str, float]:
        return {kind: sum(losses[-LAST:]) / len(losses[-LAST:]) for kind, losses in self.losses.items()}

    def told(self) -> str:
        final, rates = self.final, self.positions_per_s
        lines = [
            f"{kind}: final loss {final[kind]:.4f}, {rates[kind]:,.0f} positions/s, {self.memory[kind] / 1e9:.1f} GB"
            for kind in self.losses
        ]
        if len(final) == len(KINDS):
            lines.append(
                f"float8 over bfloat16: final loss {final['float8'] / final['bfloat16'] - 1:+.2%}, positions/s "
                f"{rates['float8'] / rates['bfloat16']:.2f} times"
            )
        return "\n".join(lines)


def train_both(
    config: MQWenConfig, shape: Shape, words: int, steps: int, device: torch.device, out: Path, compiled: bool
) -> Curves:
    """One pass a step. What is there is written after each run."""
    curves = Curves(shape, words)
    for kind, float8 in KINDS.items():
        compute = ComputeSettings(compile=compiled, float8=float8)
        case = Case(f"{kind} learning", "pretrain", shape, passes=1, compute=compute)
        settings = settings_of(case, steps)
        optimizer = replace(settings.optimizer, warmup=0.1, cooldown=0.3)
        model, settings = prepared(case, replace(settings, optimizer=optimizer), config, device)
        rows = language_rows(config, shape, words, pin=device.type == "cuda", steps=steps)
        strategy = make_strategy(model, list(model.transformer.h), settings)
        loop = bare_loop(settings, strategy, rows, next(rows))
        curves.losses[kind] = [record.loss for record in loop.records]
        curves.positions_per_s[kind] = sum(record.positions for record in loop.measured) / loop.seconds
        curves.memory[kind] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        del model, strategy, loop
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        out.mkdir(parents=True, exist_ok=True)
        (out / "float8-learning.json").write_text(json.dumps(asdict(curves)) + "\n")
    return curves


def draw(file: Path) -> Path:
    """The picture of a file that `train_both` wrote, beside it."""
    from matplotlib.figure import Figure

    known = json.loads(file.read_text())
    curves = Curves(**known | {"shape": Shape(**known["shape"])})
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, losses in curves.losses.items():
        axes.plot(range(1, len(losses) + 1), losses, label=f"{kind}: {curves.final[kind]:.4f}", linewidth=1)
    floor = -(CHANCES * CHANCES.log()).sum().item()
    axes.axhline(floor, color="grey", linestyle=":", label=f"the language's entropy: {floor:.4f}")
    axes.set(xlabel="step", ylabel="loss, nats a word", title="The same steps from the same start", yscale="log")
    axes.legend(title=f"mean of the last {LAST} steps")
    picture = file.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    return picture
