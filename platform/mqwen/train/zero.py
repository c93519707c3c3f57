"""DeepSpeed's ZeRO (Rajbhandari et al., 2020) as a strategy: stage 1 shards the optimizer's state, 2 the gradients too,
3 the weights too.

Import this only where it is used: DeepSpeed takes seconds to import, and reads DS_ACCELERATOR meanwhile.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mqwen.train.optimizer import parameter_groups
from mqwen.train.settings import RunSettings

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)  # at each of its collectives
# On a CPU DeepSpeed would compile an op, for a minute or two, in each worker that does not find it. Only its inference
# uses it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


class _Adam(torch.optim.AdamW):
    """DeepSpeed calls `step` for each part of its flat weights, once it knows the gradient's norm; before the first one
    of a step `accepts` is asked."""

    accepts: Callable[[], bool]
    answer: bool | None = None

    def step(self, closure: Any = None) -> Any:
        if self.answer is None:
            self.answer = self.accepts()
        return super().step(closure) if self.answer else None


class ZeRO:
    """A strategy (see strategy.py) of the stage that `settings.parallel.strategy` names."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module], settings: RunSettings) -> None:
        self.device = next(model.parameters()).device
        self._parameters = dict(model.named_parameters())
        groups = parameter_groups(model, settings.optimizer)
        names = {parameter: name for name, parameter in self._parameters.items()}
        self._group_names = [[names[parameter] for parameter in group["params"]] for group in groups]
        self._stage = int(settings.parallel.strategy[-1])
        self._adam = _Adam(groups, betas=settings.optimizer.betas, fused=True)
        config = self._config(model, settings)
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))  # DeepSpeed wants it; Ray has set it
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._adam, config=config, dist_init_required=False
        )
        self.model: nn.Module = self._engine
        self.optimizer: torch.optim.Optimizer = self._engine.optimizer
        self._make_moments()

    def _config(self, model: nn.Module, settings: RunSettings) -> dict[str, Any]:
        parallel = settings.parallel
        vectors = [parameter.numel() for parameter in model.parameters() if parameter.ndim < 2]
        zero: dict[str, Any] = {"stage": self._stage, "stage3_param_persistence_threshold": max(vectors, default=0) + 1}
        pinned = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if parallel.offload != "nothing":
            zero["offload_optimizer"] = pinned
        if parallel.offload == "weights":
            zero["offload_param"] = pinned
        half = settings.model.precision == "bfloat16"
        summed: dict[str, Any] = {"communication_data_type": "fp32"} if half else {}
        if half and self._stage > 1:
            summed["data_types"] = {"grad_accum_dtype": "fp32"}  # stage 1 has them in an optimizer of another kind
        return {
            "train_micro_batch_size_per_gpu": 1,  # the loop's rows and their weights are its own affair
            "managed_gradient_accumulation": False,  # a step is where step() is called
            "gradient_clipping": settings.optimizer.clip,
            "bf16": {"enabled": half},
            **summed,
            "zero_optimization": zero,
            # torch's AdamW, which needs nothing compiled.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }

    def _make_moments(self) -> None:
        """All of Adam's state is made now, as at its first step: resuming fills it."""
        zero = self._engine.optimizer
        self._flat = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for flat in self._flat:
            self._adam.state[flat] = {"step": torch.zeros((), device=flat.device)}
            self._adam.state[flat] |= {moment: torch.zeros_like(flat) for moment in MOMENTS}
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()  # what lets a parameter find its part of the flat state

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self._engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)  # ZeRO averages over the ranks

    def step(self, accepts: Callable[[float], bool] = lambda norm: True) -> float:
        norm = math.nan

        def asked() -> bool:
            nonlocal norm
            norm = float(self._engine.optimizer._global_grad_norm)
            return accepts(norm)

        self._adam.answer, self._adam.accepts = None, asked
        self._engine.step()
        if self._adam.answer is None:  # DeepSpeed itself left the step out, as a gradient was no number
            accepts(norm)
        return norm

    def state(self) -> dict[str, Any]:
        """As FSDP2's, but every tensor whole, on the CPU, and on one rank alone: tensor i on rank i mod workers."""
        weights: dict[str, torch.Tensor] = {}
        moments: dict[str, dict[str, torch.Tensor]] = {}
        step = self._adam.state[self._flat[0]]["step"]
        for name, parameter, owner in self._owned():
            whole = {"weight": self._weight(parameter)}
            if parameter.requires_grad:
                whole |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if owner == dist.get_rank():
                kept = {part: tensor.detach().to("cpu", copy=True) for part, tensor in whole.items()}
                weights[name] = kept.pop("weight")
                if kept:
                    moments[name] = kept | {"step": step.to("cpu", copy=True)}
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": names}
            for group, names in zip(self.optimizer.param_groups, self._group_names, strict=True)
        ]
        return {"model": weights, "optimizer": {"state": moments, "param_groups": groups}}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, parameter, owner in self._owned():
            mine = state["optimizer"]["state"].get(name, {})
            self._set_weight(parameter, self._shared(state["model"].get(name), parameter, owner))
            if parameter.requires_grad:
                for moment in MOMENTS:
                    whole = self._shared(mine.get(moment), parameter, owner)
                    safe_set_full_optimizer_state(parameter, whole, moment)
        steps = [one["step"].item() for one in state["optimizer"]["state"].values()]
        step = torch.tensor(max(steps, default=0.0), device=self.device)
        dist.all_reduce(step, op=dist.ReduceOp.MAX)
        for flat in self._flat:
            self._adam.state[flat]["step"].fill_(step.item())
        if self._stage < 3:
            self._engine.optimizer.update_lp_params()

    def _owned(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Name, parameter, and the rank that keeps it."""
        for number, (name, parameter) in enumerate(self._parameters.items()):
            yield name, parameter, number % dist.get_world_size()

    def _weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """The whole weight, in float32 where it is trained."""
        if parameter.requires_grad:
            return safe_get_full_fp32_param(parameter)
        with self._gathered(parameter):
            return parameter.detach().float()

    def _set_weight(self, parameter: nn.Parameter, whole: torch.Tensor) -> None:
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, whole)
        if not parameter.requires_grad or self._stage == 3:
            with self._gathered(parameter):
                parameter.data.copy_(whole)

    def _gathered(self, parameter: nn.Parameter) -> Any:
        """During the block the parameter is whole; what is written to it stays."""
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3)

    def _shared(self, tensor: torch.Tensor | None, parameter: nn.Parameter, owner: int) -> torch.Tensor:
        """The owner's tensor, on every rank."""
        shape = getattr(parameter, "ds_shape", parameter.shape)  # stage 3 leaves nothing of a parameter's own
        whole = torch.empty(shape, device=self.device) if tensor is None else tensor.to(self.device, torch.float32)
        dist.broadcast(whole, src=owner)
        return whole
