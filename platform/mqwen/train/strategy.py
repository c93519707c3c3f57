"""How one model spreads over the workers. The loop knows this interface and nothing of what is behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mqwen.model import MQWenLMHeadModel
from mqwen.train.compute import prepare
from mqwen.train.optimizer import parameter_groups
from mqwen.train.settings import ParallelSettings, RunSettings


class Strategy(Protocol):
    """Holds the sharded model and its optimizer. Every rank calls each method equally often."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds this rank's part of the global batch's loss to the gradients: the sum over ranks is the gradient.

        `last` says that a step follows, not another pass.
        """
        ...

    def step(self, accepts: Callable[[float], bool] = lambda norm: True) -> float:
        """Clips, updates if `accepts` says so of the gradient's global norm before clipping, clears the gradients;
        returns that norm."""
        ...

    def state(self) -> dict[str, Any]:
        """This rank's part of weights ("model") and optimizer state ("optimizer"), by the names of the parameters, as
        torch.distributed.checkpoint writes and fills it: the same keys and shapes whatever the strategy."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class FSDP2:
    """torch's `fully_shard`: every block of the language model a unit, the rest (embeddings, picture path) another."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module], settings: RunSettings) -> None:
        parallel = settings.parallel
        self.device = next(model.parameters()).device
        self._alone = dist.get_world_size() == 1
        half = torch.bfloat16 if settings.model.precision == "bfloat16" else None
        pinned = self.device.type == "cuda"
        options: dict[str, Any] = {
            "mesh": _mesh(self.device, parallel),
            "reshard_after_forward": parallel.reshard_after_forward and not self._alone,
            # The sharded weights stay float32, and so do gradients once they are summed.
            "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None),
            "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if parallel.offload == "weights" else OffloadPolicy(),
        }
        for block in blocks:
            fully_shard(block, **options)
        self._sharded = fully_shard(model, **options)
        self.model = model
        self._clip = settings.optimizer.clip
        # The groups are made now because sharding has put new parameters in the place of the old ones.
        groups = parameter_groups(model, settings.optimizer)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, betas=settings.optimizer.betas, fused=True)
        # All of Adam's state is made now: resuming asks a checkpoint for it, also for weights that get no gradient, as
        # CLIP's post_layernorm. The call takes a step of size zero, which is not to count.
        get_optimizer_state_dict(model, self.optimizer)
        for state in self.optimizer.state.values():
            state["step"].zero_()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        if self._alone:
            # Nothing is to be exchanged: weights stay cast, and gradients add up where they are, until the step.
            self._sharded.set_requires_gradient_sync(last)
            self._sharded.set_reshard_after_backward(last)
        (loss * dist.get_world_size()).backward()  # fully_shard averages over the ranks

    def step(self, accepts: Callable[[float], bool] = lambda norm: True) -> float:
        clipped = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip, foreach=True)
        norm = (clipped.full_tensor() if isinstance(clipped, DTensor) else clipped).item()
        if accepts(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state(self) -> dict[str, Any]:
        weights, optimizer = get_state_dict(self.model, self.optimizer, options=StateDictOptions())
        return {"model": weights, "optimizer": optimizer}

    def load_state(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _mesh(device: torch.device, parallel: ParallelSettings) -> DeviceMesh:
    """All workers in a line; or, with `parallel.shard`, groups of so many, which hold the model once each (HSDP)."""
    workers = dist.get_world_size()
    if not parallel.shard:
        return init_device_mesh(device.type, (workers,))
    shape = (workers // parallel.shard, parallel.shard)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def make_strategy(model: MQWenLMHeadModel, blocks: list[nn.Module], settings: RunSettings) -> Strategy:
    """The model spread over the workers as the settings say; `blocks` are its repeated layers."""
    prepare(model, settings.compute)
    if settings.parallel.strategy == "fsdp2":
        return FSDP2(model, blocks, settings)
    from mqwen.train.zero import ZeRO

    return ZeRO(model, blocks, settings)
