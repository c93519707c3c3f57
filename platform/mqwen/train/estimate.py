"""What a recipe needs before it runs: memory of a worker, operations and time of a step.

Weights, gradients and optimizer state follow from the strategy. What a forward and a backward pass hold beside them is
counted: the model runs once on tensors without memory, one row, and every tensor is counted as long as it lives. That
takes a recipe's precision and every memory option into account, as they are what runs.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from mqwen.model import MQWenConfig, MQWenLMHeadModel
from mqwen.model.chat import IGNORED
from mqwen.model.loss import Head, labelled_loss
from mqwen.train.build import outline
from mqwen.train.compute import prepare
from mqwen.train.cost import cost_of
from mqwen.train.settings import DataSettings, RunSettings, SettingsError

BUCKET = 500_000_000  # elements of gradients that ZeRO collects before it reduces them
FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Load:
    """What is in a pack, beside that it is full: pictures, conversations of equal length, and the share of positions
    that are labelled."""

    pictures: int = 4
    conversations: int = 4
    labelled: float = 0.15


@dataclass(frozen=True)
class PlannedRow:
    """A batch as the loop takes it."""

    inputs: dict[str, Tensor]
    supervised: int
    positions: int
    images: int
    place: tuple[int, int, int] = (0, 0, 0)
    epochs: float = 0.0
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one worker's memory, by what is in them, and floating-point operations of a step over all workers.

    `parameters` counts all and `trained` those that learn.
    """

    memory: dict[str, float]
    flops: float
    positions: int
    parameters: int
    trained: int

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


def estimate(settings: RunSettings, config: MQWenConfig, load: Load) -> Estimate:
    """Raises SettingsError as `build.outline`, and where a pack cannot hold what `load` says."""
    model = outline(settings, config)
    row = planned_row(settings.data, config, load)
    sizes = _Sizes.of(model, settings)
    held = _held(settings, config, row)
    if settings.parallel.strategy == "fsdp2":
        # What is in no block is reduced at the end of a pass, when nothing of the row is left.
        held = max(held, float((sizes.compute + FLOAT) * sizes.trained_rest))
    memory = _states(sizes, settings) | {"row": held}
    rows = settings.data.rows_per_step
    return Estimate(memory, cost_of(model).of(row) * rows, row.positions * rows, sizes.all, sizes.trained)


@dataclass(frozen=True)
class _Sizes:
    """Numbers of weights: all, of one block, of what is in no block; and as many trained ones. `compute` is the bytes
    of one in the passes."""

    all: int
    block: int
    rest: int
    trained: int
    trained_block: int
    trained_rest: int
    compute: int

    @classmethod
    def of(cls, model: MQWenLMHeadModel, settings: RunSettings) -> _Sizes:
        blocks = list(model.transformer.h)
        all_, trained = _count(model), _count(model, trained=True)
        block, trained_block = _count(blocks[0]), _count(blocks[0], trained=True)
        return cls(
            all=all_,
            block=block,
            rest=all_ - len(blocks) * block,
            trained=trained,
            trained_block=trained_block,
            trained_rest=trained - len(blocks) * trained_block,
            compute=2 if settings.model.precision == "bfloat16" else FLOAT,
        )


def _count(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _states(sizes: _Sizes, settings: RunSettings) -> dict[str, float]:
    """Bytes of weights, gradients and Adam's two moments on one worker, and of what the strategy gathers meanwhile."""
    parallel = settings.parallel
    workers = parallel.workers
    if parallel.strategy == "fsdp2":
        shard = parallel.shard or workers
        gathered = sizes.rest + 2 * sizes.block if parallel.reshard_after_forward else sizes.all
        memory = {
            "weights": FLOAT * sizes.all / shard,
            "gradients": FLOAT * sizes.trained / shard,
            "optimizer": 2 * FLOAT * sizes.trained / shard,
            "gathered weights": float(sizes.compute * gathered),
            "gathered gradients": float((sizes.compute + FLOAT) * sizes.trained_block),
        }
    else:
        stage = int(parallel.strategy[-1])
        bucket = sizes.compute * min(BUCKET, sizes.trained)
        memory = {
            "weights": sizes.compute * sizes.all / (workers if stage == 3 else 1) + FLOAT * sizes.trained / workers,
            "gradients": sizes.compute * sizes.trained / (1 if stage == 1 else workers)
            + (FLOAT * sizes.trained / workers if sizes.compute != FLOAT else 0),
            "optimizer": 2 * FLOAT * sizes.trained / workers,
            "gathered weights": float(sizes.compute * sizes.all) if stage == 3 else 0.0,
            "gathered gradients": float(bucket),
        }
    if parallel.offload == "weights":
        memory |= {"weights": 0.0, "gradients": 0.0}
    if parallel.offload != "nothing":
        memory["optimizer"] = 0.0
    return memory


def planned_row(data: DataSettings, config: MQWenConfig, load: Load) -> PlannedRow:
    """A full row. Raises SettingsError where its pictures do not fit."""
    length, patches = data.pack_length // load.conversations, config.image_positions
    ids: list[int] = []
    segments: list[int] = []
    for number in range(load.conversations):
        pictures = load.pictures * (number + 1) // load.conversations - load.pictures * number // load.conversations
        text = length - pictures * patches
        if text < 1:
            raise SettingsError(
                f"{pictures} pictures of {patches} positions do not fit a conversation of {length}; "
                "give fewer --pictures or --conversations, or a larger --data.pack-length"
            )
        ids += [config.image_token_id] * pictures + [config.image_token_id - 1] * text
        segments += [number + 1] * (pictures + text)
    input_ids = torch.tensor([ids] * data.packs_per_row)
    labels = torch.full_like(input_ids, IGNORED)
    words = torch.nonzero(torch.tensor(ids) != config.image_token_id)[:, 0]
    asked = words[-max(1, min(len(words), round(load.labelled * load.conversations * length))) :]
    labels[:, asked] = input_ids[:, asked]
    return PlannedRow(
        inputs={"input_ids": input_ids, "labels": labels, "segment_ids": torch.tensor([segments] * data.packs_per_row)},
        supervised=int((labels != IGNORED).sum()),
        positions=data.packs_per_row * load.conversations * length,
        images=data.packs_per_row * load.pictures,
    )


def _held(settings: RunSettings, config: MQWenConfig, row: PlannedRow) -> float:
    """The most bytes that a row's forward and backward pass hold at once, but weights and their blocks' gradients.

    Compiled blocks keep what torch.compile's partitioner decides on, so they are partitioned here too, and run
    operation by operation. Conversations are no matter: attention keeps as much of a row that is one.
    """
    model = outline(settings, config).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        materialize(model, getattr(torch, settings.model.precision))
    for parameter in model.transformer.h.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda done: setattr(done, "grad", None))
    torch.compiler.reset()  # or another estimate's blocks would count as recompilations
    prepare(model, settings.compute, backend="aot_eager_decomp_partition")
    if settings.parallel.gpus_per_worker and isinstance(model.lm_head, Head):
        model.lm_head.kernel = in_place
    expanded = model.transformer.expand(row.inputs["input_ids"], row.images, labels=row.inputs["labels"])
    side = config.vision_config.image_size
    with fake, Living() as living:
        pictures = torch.empty(row.images, 3, side, side, dtype=torch.uint8)
        hidden = model.transformer(images=model.encode_images(pictures), expanded=expanded).last_hidden_state
        labelled_loss(model.lm_head, hidden, expanded, 1).backward()
    return float(living.most)


def materialize(model: nn.Module, dtype: torch.dtype) -> None:
    """On the CPU from now on, in the passes' `dtype`: with memory, or, under FakeTensorMode, as if."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            made = torch.empty(parameter.shape, dtype=dtype)
            setattr(module, name, nn.Parameter(made, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def in_place(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the memory that softmax_kernel's does."""
    return logits.new_zeros((), dtype=torch.float32), logits


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on, as long as each lives."""

    supports_higher_order_operators = True  # compiled recomputation has some

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = WeakIdKeyDictionary()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled meanwhile is compiled as without it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, made)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = True
            size = storage.nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size
