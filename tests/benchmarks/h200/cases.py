"""The project's training step, and transformers' LLaVA beside it, on made rows."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mqwen.model import MQWenConfig
from mqwen.train.build import build_model
from mqwen.train.loop import Data, Progress, StepRecord, Watch, train
from mqwen.train.recipes import recipe
from mqwen.train.settings import ComputeSettings, RunSettings
from mqwen.train.strategy import Strategy, make_strategy
from tests.benchmarks.h200.flops import flops
from tests.benchmarks.h200.measure import DATASHEET, Ceilings
from tests.benchmarks.h200.rows import Shape, made_rows, supervise_all

WARM_STEPS = 2


@dataclass(frozen=True)
class Case:
    """`passes` forward and backward passes make a step."""

    name: str
    recipe: str
    shape: Shape
    passes: int = 4
    compute: ComputeSettings = field(default_factory=lambda: ComputeSettings(compile=True))
    flash: bool = False  # torch's FlashAttention-2 in the place of cuDNN


@dataclass
class Result:
    """Seconds are of a step; `split` by part, on the device's clock. `memory` in bytes, the allocator's peak."""

    name: str
    recipe: str
    dtype: str
    row: int
    positions_per_s: float
    share_of_ceiling: float
    images_per_s: float = 0.0
    mfu: float = 0.0
    flops_per_position: float = 0.0
    step_s: float = 0.0
    positions_per_step: int = 0
    memory: int = 0
    reserved: int = 0
    first_steps_s: float = 0.0
    split: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


class Watched:
    """A strategy whose parts are timed on the device, without waiting for it."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._marks: list[tuple[str, Any, Any]] = []
        self.device, self.optimizer = strategy.device, strategy.optimizer

    def model(self, **inputs: Any) -> Any:
        with self._span("forward"):
            return self._strategy.model(**inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        with self._span("backward"):
            self._strategy.backward(loss, last)

    def step(self, accepts: Any = lambda norm: True) -> float:
        with self._span("optimizer"):
            return self._strategy.step(accepts)

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        self._marks.append((name, start, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def split(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for name, start, end in self._marks:
            found[name] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
        self._marks = []
        return dict(found)


def settings_of(case: Case, steps: int) -> RunSettings:
    base = recipe(case.recipe)
    return replace(
        base,
        name="benchmark",
        steps=steps,
        model=replace(base.model, precision="bfloat16"),
        data=replace(
            base.data, pack_length=case.shape.length, packs_per_row=case.shape.rows, rows_per_step=case.passes
        ),
        compute=case.compute,
        checkpoint=replace(base.checkpoint, every=10**9),
    )


def run_case(case: Case, config: MQWenConfig, device: torch.device, found: Ceilings, steps: int) -> Result:
    """The project's loop over `steps` measured steps, after two to warm up."""
    settings = settings_of(case, WARM_STEPS + steps)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.backends.cuda.enable_flash_sdp(case.flash)
    torch._dynamo.reset()
    with torch.device(device):
        model = build_model(settings, config).train()
    if case.shape.supervised == "all":
        supervise_all(model)
    dtype = torch.bfloat16 if cuda else torch.float32
    settings = replace(settings, model=replace(settings.model, precision=str(dtype).removeprefix("torch.")))
    watched = Watched(make_strategy(model, list(model.transformer.h), settings))
    rows = made_rows(config, case.shape, pin=cuda)
    some = next(rows)
    needed = flops(model, config, some.runs, some.supervised, some.images) / some.positions

    records: list[StepRecord] = []
    begun = time.perf_counter()
    warmed = 0.0

    def on_step(record: StepRecord) -> None:
        nonlocal warmed
        records.append(record)
        if record.step == WARM_STEPS:
            watched.split()
            warmed = time.perf_counter() - begun

    train(settings, watched, Data(rows, some), Progress(), Watch(on_step, lambda _: None))  # type: ignore[arg-type]
    measured = records[WARM_STEPS:]
    took = sum(record.seconds for record in measured)
    split = {name: value / steps for name, value in watched.split().items()}
    split["data"] = sum(record.data_wait for record in measured) / steps
    split["rest"] = took / steps - sum(split.values())
    rate = sum(record.positions for record in measured) / took
    return Result(
        name=case.name,
        recipe=case.recipe,
        dtype=str(dtype).removeprefix("torch."),
        row=case.shape.length,
        positions_per_s=rate,
        share_of_ceiling=rate * needed / found.product,
        images_per_s=sum(record.images for record in measured) / took,
        mfu=rate * needed / DATASHEET,
        flops_per_position=needed,
        step_s=took / steps,
        positions_per_step=measured[0].positions,
        memory=torch.cuda.max_memory_allocated() if cuda else 0,
        reserved=torch.cuda.max_memory_reserved() if cuda else 0,
        first_steps_s=warmed,
        split=split,
        losses=[record.loss for record in records],
        settings=asdict(case),
    )


@contextmanager
def one_process(device: torch.device) -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{Path(folder) / 'meeting'}", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def run_llava(shape: Shape, config: MQWenConfig, device: torch.device, found: Ceilings, steps: int) -> Result:
    """transformers' LlavaForConditionalGeneration of the same size on the same rows, one pass a step: SDPA, bfloat16
    weights, AdamW fused in bfloat16, tower frozen. Its logits are of all positions, whatever is supervised."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    text = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size // 2,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=False,
    )
    both = LlavaConfig(
        vision_config=config.vision_config,
        text_config=text,
        image_token_index=config.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    both._attn_implementation = "sdpa"
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.backends.cuda.enable_flash_sdp(True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(both).train()
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    rows = made_rows(config, shape, pin=cuda)
    size, losses = config.vision_config.image_size, list[float]()
    mean = torch.tensor(config.image_mean, device=device).view(3, 1, 1)
    std = torch.tensor(config.image_std, device=device).view(3, 1, 1)

    def step() -> None:
        row = next(rows)
        ids = row.inputs["input_ids"]
        widths = torch.where(ids == config.image_token_id, config.image_positions, 1)
        expanded = torch.stack([one.repeat_interleave(many) for one, many in zip(ids, widths, strict=True)]).to(device)
        pixels = row.inputs["pixel_values"].to(device, non_blocking=True)
        pixels = ((pixels.float() / 255 - mean) / std).to(dtype).view(-1, 3, size, size)
        loss = model(input_ids=expanded, pixel_values=pixels, labels=expanded).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    for _ in range(WARM_STEPS):
        step()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    took = time.perf_counter() - started
    positions = shape.rows * shape.length
    rate = steps * positions / took
    some = next(rows)
    layers = config.num_hidden_layers
    weights = layers * (4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size // 2)
    from tests.benchmarks.h200.flops import tower

    needed = 6.0 * (weights + config.hidden_size * config.vocab_size) + 6.0 * layers * config.hidden_size * shape.length
    needed += some.images * tower(config) / positions
    return Result(
        name=f"transformers LLaVA, {shape.rows} x {shape.length}",
        recipe="transformers",
        dtype=str(dtype).removeprefix("torch."),
        row=shape.length,
        positions_per_s=rate,
        share_of_ceiling=rate * needed / found.product,
        images_per_s=rate * some.images / positions,
        mfu=rate * needed / DATASHEET,
        flops_per_position=needed,
        step_s=took / steps,
        positions_per_step=positions,
        memory=torch.cuda.max_memory_allocated() if cuda else 0,
        reserved=torch.cuda.max_memory_reserved() if cuda else 0,
        losses=losses,
    )
