"""What a worker of many holds, and gathers and reduces in a step, counted without any: the strategy and a pass of the
model run on tensors without memory (FakeTensorMode), in a process group of so many ranks that only this one is there
of."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mqwen.model import MQWenConfig
from mqwen.model.loss import labelled_loss
from mqwen.train.build import outline
from mqwen.train.estimate import Living, Load, estimate, in_place, materialize, planned_row
from mqwen.train.recipes import recipe
from mqwen.train.settings import ComputeSettings
from mqwen.train.strategy import FSDP2
from tests.benchmarks.h200.whole_job import Job
from tests.benchmarks.several.report import Case

KINDS = {"_allgather_base_": "gathered", "_reduce_scatter_base_": "reduced", "allreduce_": "summed"}
EVERY = 2  # positions that are a picture's are one of so many


class Traffic(TorchDispatchMode):
    """Bytes of the whole tensors that collectives gather (their results), and reduce or sum (what they are given)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.calls = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = KINDS.get(func.name().removeprefix("c10d::").partition(".")[0])
        if kind:
            tensors = tree_leaves(args[1 if kind == "reduced" else 0])
            self.bytes[kind] += sum(one.numel() * one.element_size() for one in tensors)
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def plan(config: MQWenConfig, job: Job, workers: int) -> Case:
    """Of recipe sft-full with one pass a step; blocks are not compiled, which changes no traffic."""
    base = recipe("sft-full")
    settings = replace(
        base,
        data=replace(base.data, pack_length=job.length, packs_per_row=job.packs, rows_per_step=workers),
        parallel=replace(base.parallel, workers=workers),
        compute=ComputeSettings(),
    )
    load = Load(job.length // EVERY // config.image_positions, 1, 1.0)
    row = planned_row(settings.data, config, load)
    planned = estimate(settings, config, load)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=workers)
    try:
        model = outline(settings, config).train()
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            materialize(model, torch.float32)
        model.lm_head.kernel = in_place
        # The mesh of ranks has numbers that count, so only the weights have none.
        strategy = FSDP2(model, list(model.transformer.h), settings)
        state = [tensor for one in strategy.optimizer.state.values() for tensor in one.values()]
        states = sum(map(local_bytes, [*model.parameters(), *state]))
        expanded = model.transformer.expand(row.inputs["input_ids"], row.images, labels=row.inputs["labels"])
        side = config.vision_config.image_size

        def forward(pixels: torch.Tensor) -> torch.Tensor:
            hidden = model.transformer(images=model.encode_images(pixels), expanded=expanded).last_hidden_state
            return labelled_loss(model.lm_head, hidden, expanded, 1)

        model.forward = forward  # labels and pictures are found outside of it, where there are numbers
        with fake, Living() as living, Traffic() as traffic:
            strategy.backward(model(torch.empty(row.images, 3, side, side, dtype=torch.uint8)), last=True)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    finally:
        dist.destroy_process_group()
    return {
        "name": f"plan fsdp2 {workers}",
        "part": "plan",
        "strategy": "fsdp2",
        "world_size": workers,
        "backend": "fake",
        "device": "none",
        "state_GB": states / 1e9,
        "step_GB": living.most / 1e9,
        "memory_GB": (states + living.most) / 1e9,
        "planned_GB": planned.bytes / 1e9,
        **{f"{kind}_GB": traffic.bytes[kind] / 1e9 for kind in KINDS.values()},
        "calls": dict(traffic.calls),
        "positions": row.positions,
    }


def local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()
