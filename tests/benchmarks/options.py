"""What the memory and speed options of a training step change: nothing of its losses; its time, and its peak memory.

python -m tests.benchmarks.options [--steps 20]

Each option trains the same model on the same packed rows, in float32 on this CPU. "Without" are the plain ways that the
code does not take: logits of all positions, attention under a mask, AdamW tensor by tensor. Memory is what a step
allocates at most beside what was there before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F  # noqa: N812
import tyro
from torch import Tensor

from mqwen.model import MQWenConfig, attention, loss
from mqwen.train import loop
from mqwen.train.build import build_model
from mqwen.train.loop import Data, Progress, StepRecord, Watch, train
from mqwen.train.recipes import recipe
from mqwen.train.settings import ComputeSettings, DataSettings, RunSettings
from mqwen.train.strategy import Strategy, make_strategy
from tests.benchmarks.h200.cases import one_process
from tests.benchmarks.h200.rows import Shape, made_rows
from tests.benchmarks.result import write_result


@dataclass(frozen=True)
class Sizes:
    steps: int = 20
    channels: int = 192
    layers: int = 6
    vocabulary: int = 8192
    rows: int = 4
    length: int = 512

    @property
    def config(self) -> MQWenConfig:
        return MQWenConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.channels,
            num_hidden_layers=self.layers,
            num_attention_heads=self.channels // 16,
            kv_channels=16,
            intermediate_size=5 * self.channels,
            seq_length=self.length,
            image_token_id=self.vocabulary - 1,
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            },
        )


@dataclass(frozen=True)
class Trained:
    """Losses of all steps, gradients of the first, seconds of a step, and bytes that one takes at most."""

    losses: list[float]
    gradients: dict[str, Tensor]
    seconds: float
    memory: int


def masked(query: Tensor, key: Tensor, value: Tensor, plan: attention.AttentionPlan) -> Tensor:
    """What `attention._attend_runs` computes, on the flattened rows, by a mask of who sees whom."""
    assert plan.runs is not None
    run = torch.tensor([n for n, length in enumerate(plan.runs) for _ in range(length)])
    mask = (run.unsqueeze(1) == run.unsqueeze(0)).tril()
    q, k, v = (x.flatten(0, 1).transpose(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).reshape(query.shape)


def adam_by_tensors(*arguments: Any, fused: bool, make: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> Any:
    return make(*arguments, foreach=False, **options)


WITHOUT: dict[str, tuple[Any, str, Any]] = {
    "without labelled positions alone: all logits": (loop, "LOSS_ONLY", {"use_cache": False, "logits_to_keep": 0}),
    "without variable-length attention: a mask": (attention, "_attend_runs", masked),
    "without fused AdamW": (torch.optim, "AdamW", adam_by_tensors),
}
OPTIONS: dict[str, ComputeSettings] = {
    "selective recomputation": ComputeSettings(recompute="selective"),
    "full recomputation": ComputeSettings(recompute="full"),
    "compiled": ComputeSettings(compile=True),
    "compiled, selective recomputation": ComputeSettings(compile=True, recompute="selective"),
}
ROUNDED: dict[str, ComputeSettings] = {
    "8 bits": ComputeSettings(float8=True),
    "8 bits, compiled, selective recomputation": ComputeSettings(compile=True, recompute="selective", float8=True),
}
CHUNKS = "head and loss in chunks of 64"
AS_IT_IS = "as it is"
ALL = [AS_IT_IS, *WITHOUT, CHUNKS, *OPTIONS]


def trained(name: str, sizes: Sizes) -> Trained:
    """One of ALL or ROUNDED; a process group must be there."""
    shape = Shape(sizes.rows, sizes.length, sizes.length // 4, "answers")
    base = recipe("sft-full")
    settings = replace(
        base,
        steps=sizes.steps,
        model=replace(base.model, precision="float32"),
        data=DataSettings(pack_length=sizes.length, packs_per_row=sizes.rows, rows_per_step=2),
        optimizer=replace(base.optimizer, learning_rate=1e-3, learning_rates={}),
        compute=(OPTIONS | ROUNDED).get(name, ComputeSettings()),
    )
    torch._dynamo.reset()
    with ExitStack() as stack:
        if name in WITHOUT:
            place, attribute, instead = WITHOUT[name]
            stack.enter_context(patch.object(place, attribute, instead))
        if name == CHUNKS:
            stack.enter_context(patch.object(loss, "CHUNK", 64))
        model = build_model(settings, sizes.config).train()
        strategy = Kept(make_strategy(model, list(model.transformer.h), settings))
        return run(settings, strategy, made_rows(sizes.config, shape, pin=False, different=4))


class Kept:
    """A strategy whose first gradients are kept."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self.model, self.device, self.optimizer = strategy.model, strategy.device, strategy.optimizer
        self.backward = strategy.backward
        self.gradients: dict[str, Tensor] = {}

    def step(self, accepts: Callable[[float], bool]) -> float:
        if not self.gradients:
            known = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            self.gradients = {name: grad.full_tensor().clone() for name, grad in known.items()}  # type: ignore[attr-defined]
        return self._strategy.step(accepts)


def run(settings: RunSettings, strategy: Kept, rows: Iterator[Any]) -> Trained:
    records, peaks, measuring = list[StepRecord](), list[int](), ExitStack()

    def on_step(record: StepRecord) -> None:
        records.append(record)
        if record.step == settings.steps - 1:  # compiled by then
            measuring.enter_context(peak(peaks))
        elif record.step == settings.steps:
            measuring.close()

    train(settings, strategy, Data(rows, next(rows)), Progress(), Watch(on_step, lambda _: None))  # type: ignore[arg-type]
    steps = [record.seconds for record in records[2:-1]]
    return Trained([record.loss for record in records], strategy.gradients, sum(steps) / len(steps), peaks[0])


@contextmanager
def peak(found: list[int]) -> Iterator[None]:
    """The most bytes that were allocated and not yet freed, counted from here on."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        yield
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    found.append(max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))))


def differences(one: Trained, other: Trained) -> tuple[float, float]:
    """The largest of the losses', and of the gradients' as a share of the gradient's norm."""
    assert one.gradients.keys() == other.gradients.keys()
    losses = max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
    pairs = [(one.gradients[name], known) for name, known in other.gradients.items()]
    return losses, max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in pairs)


def main() -> None:
    sizes = tyro.cli(Sizes, description=__doc__)
    lines = ["| option | losses differ by | gradients | step | memory |", "|---|---|---|---|---|"]
    with one_process(torch.device("cpu")):
        plain = None
        for name in ALL:
            started = time.perf_counter()
            found = trained(name, sizes)
            plain = plain or found
            off, gradients = differences(found, plain)
            cells = [name, f"{off:.1e}", f"{gradients:.1e}", f"{found.seconds * 1e3:.0f} ms"]
            lines.append(f"| {' | '.join(cells)} | {found.memory / 2**20:.0f} MiB |")
            print(f"{lines[-1]} [{time.perf_counter() - started:.0f} s]", flush=True)
    write_result("options", "\n".join(lines))


if __name__ == "__main__":
    main()
