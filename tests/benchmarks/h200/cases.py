"""The project's training step, and transformers' LLaVA beside it, on made rows."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from mqwen.model import MQWenConfig
from mqwen.model.llava import llava_config
from mqwen.storage import locate
from mqwen.train.build import build_model
from mqwen.train.loop import Accepts, Data, Progress, StepRecord, Watch, train
from mqwen.train.recipes import recipe
from mqwen.train.saver import Saver
from mqwen.train.settings import ComputeSettings, RunSettings
from mqwen.train.strategy import Strategy, make_strategy
from tests.benchmarks.h200.flops import flops
from tests.benchmarks.h200.measure import DATASHEET, Ceilings, print_kernels, profiled
from tests.benchmarks.h200.rows import Shape, made_rows, supervise_all

WARM_STEPS = 2
SAVES_AFTER = 6  # steps, and again after as many where the one before is written
SAVING_STEPS = 16


@dataclass(frozen=True)
class Case:
    """`passes` forward and backward passes make a step. `config`: another model's, than the benchmark's own."""

    name: str
    recipe: str
    shape: Shape
    passes: int = 4
    compute: ComputeSettings = field(default_factory=lambda: ComputeSettings(compile=True))
    saves: bool = False  # checkpoints on the way
    config: dict[str, Any] = field(default_factory=dict)


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
    checkpoint: dict[str, Any] = field(default_factory=dict)


class Watched:
    """A strategy whose parts are timed on the device, without waiting for it."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._marks: list[tuple[str, Any, Any]] = []
        self.model, self.device, self.optimizer = strategy.model, strategy.device, strategy.optimizer
        begun = list[Any]()
        self.model.register_forward_pre_hook(lambda *_: begun.append(self._mark()), prepend=True)
        self.model.register_forward_hook(lambda *_: self._marks.append(("forward", begun.pop(), self._mark())))

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


def config_of(case: Case, usual: MQWenConfig) -> MQWenConfig:
    return MQWenConfig(**case.config) if case.config else usual


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


@dataclass
class Loop:
    """What a run of the loop left: its records, seconds of a measured step by part, seconds of the first steps."""

    records: list[StepRecord]
    split: dict[str, float]
    first_steps_s: float

    @property
    def measured(self) -> list[StepRecord]:
        return self.records[WARM_STEPS:]

    @property
    def seconds(self) -> float:
        return sum(record.seconds for record in self.measured)


def bare_loop(
    settings: RunSettings,
    strategy: Strategy,
    rows: Iterator[Any],
    blank: Any,
    on_checkpoint: Callable[[Progress], None] = lambda progress: None,
    accepts: Accepts = lambda step, loss, keys, norm: True,
    flops_of: Callable[[Any], float] = lambda row: 0.0,
    profiled_step: int = 0,
) -> Loop:
    """The project's loop without Ray; its first steps warm up. Prints where the time of `profiled_step` goes."""
    watched, records = Watched(strategy), list[StepRecord]()
    begun, warmed, compiled = time.perf_counter(), 0.0, 0
    tracing, trace = ExitStack(), list[torch.profiler.profile]()

    def on_step(record: StepRecord) -> None:
        nonlocal warmed, compiled
        records.append(record)
        if record.step == WARM_STEPS:
            watched.split()
            warmed, compiled = time.perf_counter() - begun, graphs()
        if record.step == profiled_step - 1:
            trace.append(tracing.enter_context(profiled()))
        elif record.step == profiled_step:
            tracing.close()
            print_kernels(trace[0], 1, 60)

    data = Data(rows, blank, flops=flops_of)
    train(settings, watched, data, Progress(), Watch(on_step, on_checkpoint, accepts=accepts))  # type: ignore[arg-type]
    if again := graphs() - compiled:
        print(f"  {again} graphs were compiled after the first {WARM_STEPS} steps", flush=True)
    loop = Loop(records, {}, warmed)
    steps = len(loop.measured)
    loop.split = {name: value / steps for name, value in watched.split().items()}
    loop.split["data"] = sum(record.data_wait for record in loop.measured) / steps
    loop.split["rest"] = loop.seconds / steps - sum(loop.split.values())
    return loop


def graphs() -> int:
    """How many torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def prepared(case: Case, settings: RunSettings, config: MQWenConfig, device: torch.device) -> tuple[Any, RunSettings]:
    """The model on the device, and the settings with the precision that the device is used with."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    with torch.device(device):
        model = build_model(settings, config).train()
    if case.shape.supervised == "all":
        supervise_all(model)
    precision: Any = "bfloat16" if cuda else "float32"
    return model, replace(settings, model=replace(settings.model, precision=precision))


def run_case(
    case: Case, config: MQWenConfig, device: torch.device, found: Ceilings, steps: int, profile: bool = False
) -> Result:
    """The project's loop over `steps` measured steps, after two to warm up."""
    config = config_of(case, config)
    last = SAVING_STEPS if case.saves else WARM_STEPS + steps
    model, settings = prepared(case, settings_of(case, last), config, device)
    rows = made_rows(config, case.shape, pin=device.type == "cuda")
    some = next(rows)
    needed = flops(model, config, some.runs, some.supervised, some.images) / some.positions
    strategy = make_strategy(model, list(model.transformer.h), settings)
    if not case.saves:
        loop = bare_loop(settings, strategy, rows, some, profiled_step=last if profile else 0)
        return result_of(case.name, case.recipe, settings, loop, needed, found, asdict(case))
    with tempfile.TemporaryDirectory() as folder:
        saving = Saving(strategy, replace(settings, runs=folder))
        loop = bare_loop(saving.settings, strategy, rows, some, saving.save, saving.accepts)
        result = result_of(case.name, case.recipe, settings, loop, needed, found, asdict(case))
        result.checkpoint = saving.found(loop)
    return result


class Saving:
    """Checkpoints beside the training, as mqwen.train.worker makes them."""

    def __init__(self, strategy: Strategy, settings: RunSettings) -> None:
        self._strategy = strategy
        self.settings = replace(settings, checkpoint=replace(settings.checkpoint, every=SAVES_AFTER, keep=1))
        self._folder = Path(settings.runs) / "run"
        self._saver = Saver(locate(self._folder), self.settings)
        self._begun, self._calls, self._written, self._beside = 0.0, dict[int, float](), list[float](), list[int]()
        self._before = psutil.Process().memory_info().rss
        self._saver.make_room(strategy.state())

    def save(self, progress: Progress) -> None:
        if self._saver.busy():
            return
        self._begun = time.perf_counter()
        self._saver.save(self._strategy.state(), progress, None, {}, self._committed)
        self._calls[progress.step] = time.perf_counter() - self._begun

    def accepts(self, step: int, *_: Any) -> bool:
        self._saver.wait_for_copy()
        if step > min(self._calls, default=step) and self._saver.busy():
            self._beside.append(step)
        return True

    def _committed(self) -> None:
        self._written.append(time.perf_counter() - self._begun)

    def found(self, loop: Loop) -> dict[str, Any]:
        """Seconds: how much longer the loop took from a step's end to the next one's when a checkpoint began between
        them; of that the call alone; from the call to the commit; steps beside the writing, and undisturbed ones.
        Bytes: of the files, and of memory for the copy."""
        self._saver.wait()
        took = {record.step: record.seconds for record in loop.records}
        alone = [took[record.step] for record in loop.measured if record.step <= SAVES_AFTER]
        usual, calls = statistics.median(alone), self._calls
        next_to = {step: took[step + 1] for step in calls if step + 1 in took}
        return {
            "stalls": [calls[step] + seconds - usual for step, seconds in next_to.items()],
            "calls": list(calls.values()),
            "written": self._written,
            "steps_beside": [took[step] for step in self._beside],
            "steps": alone,
            "bytes": sum(file.stat().st_size for file in self._folder.rglob("*.distcp")),
            "memory": psutil.Process().memory_info().rss - self._before,
        }


def result_of(
    name: str,
    recipe: str,
    settings: RunSettings,
    loop: Loop,
    flops_per_position: float,
    found: Ceilings,
    described: dict[str, Any],
) -> Result:
    cuda = torch.cuda.is_available()
    rate = sum(record.positions for record in loop.measured) / loop.seconds
    return Result(
        name=name,
        recipe=recipe,
        dtype=settings.model.precision,
        row=settings.data.pack_length,
        positions_per_s=rate,
        share_of_ceiling=rate * flops_per_position / found.product,
        images_per_s=sum(record.images for record in loop.measured) / loop.seconds,
        mfu=rate * flops_per_position / DATASHEET,
        flops_per_position=flops_per_position,
        step_s=loop.seconds / len(loop.measured),
        positions_per_step=loop.measured[0].positions,
        memory=torch.cuda.max_memory_allocated() if cuda else 0,
        reserved=torch.cuda.max_memory_reserved() if cuda else 0,
        first_steps_s=loop.first_steps_s,
        split=loop.split,
        losses=[record.loss for record in loop.records],
        settings=described,
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
    from transformers import LlavaForConditionalGeneration

    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    both = llava_config(config, 0, str(dtype).removeprefix("torch."))
    both._attn_implementation = "sdpa"
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
