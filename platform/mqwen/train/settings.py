"""A run's settings: everything that decides what a run computes, as typed dataclasses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from mqwen.errors import LastingError


class SettingsError(LastingError, ValueError):
    """Settings that cannot work; the message names the option, what is allowed and the way out."""


@dataclass(frozen=True)
class LoraSettings:
    """An adapter of rank `r` beside each linear layer whose name ends in one of `targets`; 0 is none.

    All else is frozen but `modules_to_save`, which are trained whole and belong to the adapter.
    """

    r: int = 0
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("c_attn", "w1", "w2")
    modules_to_save: tuple[str, ...] = ("feature_proj",)


@dataclass(frozen=True)
class ModelSettings:
    """Where the weights start: an artifact's URI, or fresh weights of the sizes in `config` (MQWenConfig's names).

    `precision` is what forward and backward passes compute in. Weights and optimizer are float32 in any case.
    """

    init_from: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    lora: LoraSettings = field(default_factory=LoraSettings)
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class DataSettings:
    """`dataset` is a URI that jobs/ingest.py wrote; instead, `mixture` gives several and the weight of each, its share
    of the samples. A row is what one forward pass takes.

    `window_runs` runs of `run_samples` neighbours are shuffled and packed together. More of them shuffle better, which
    a dataset that is sorted needs, and pack tighter; they cost memory.

    `max_bad` is the share of samples that may turn out unreadable before the run stops.
    """

    dataset: str = ""
    mixture: dict[str, float] = field(default_factory=dict)
    pack_length: int = 2048
    packs_per_row: int = 1
    rows_per_step: int = 8
    run_samples: int = 64
    window_runs: int = 16
    max_bad: float = 0.001


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, clipped. The learning rate rises over the share `warmup` of the budget and falls to zero at its end: as a
    cosine, as a line, or, with "wsd" (warm-up, stable, decay), as a line over the last share `cooldown` alone.

    `freeze` and the keys of `learning_rates` are patterns of parameter names, as `visual.*`: the former take no
    gradient, the latter learn at a rate of their own.
    """

    learning_rate: float = 1e-4
    learning_rates: dict[str, float] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    warmup: float = 0.05
    cooldown: float = 0.2


@dataclass(frozen=True)
class ParallelSettings:
    """`strategy` is how the model spreads over the workers: torch's FSDP2, or DeepSpeed's ZeRO, which shards optimizer
    state (1), gradients too (2), weights too (3).

    `cpus_per_worker` is what Ray sets aside for a training worker and how many threads it computes with.
    `shard` is FSDP2's number of neighbouring workers that hold the model once between them, as those of one node, each
    such group a copy of it; 0 is all workers. `offload` keeps in the CPU's memory what a GPU has no room for: optimizer
    state (ZeRO), or weights as well (FSDP2, ZeRO-3). `reshard_after_forward` (FSDP2) frees a block's gathered weights
    between its forward and its backward pass: less memory for one more gathering.

    `max_failures` is how often a run may lose its workers and go on from its last checkpoint.
    With `min_workers` a run goes on with as few where nodes are lost, and with more, up to `workers`, when others come.
    `wait_for_resources` is how many seconds a run waits at its start for others to end or the cluster to grow;
    `hang_timeout` after how many without a forward pass the workers are ended and started again. `spares` are processes
    that wait to become workers, so that a restart does not; they take some hundred megabytes each.
    """

    workers: int = 1
    min_workers: int | None = None
    strategy: Literal["fsdp2", "zero1", "zero2", "zero3"] = "fsdp2"
    shard: int = 0
    offload: Literal["nothing", "optimizer", "weights"] = "nothing"
    cpus_per_worker: int = 1
    gpus_per_worker: int = 0
    reshard_after_forward: bool = True
    max_failures: int = 3
    wait_for_resources: float = 10.0
    hang_timeout: float = 600.0
    spares: bool = True

    @property
    def fewest(self) -> int:
        """Workers without which a run cannot go on."""
        return self.workers if self.min_workers is None else self.min_workers

    def check(self) -> None:
        """Raises SettingsError for what the strategy cannot have."""
        fsdp2 = self.strategy == "fsdp2"
        if self.shard and not fsdp2:
            raise SettingsError(f"--parallel.shard is fsdp2's, {self.strategy} has none: drop one of the two")
        if self.shard and self.min_workers is not None:
            raise SettingsError("--parallel.shard needs a number of workers that stays: drop --parallel.min-workers")
        if self.shard and self.workers % self.shard:
            raise SettingsError(f"--parallel.shard {self.shard} does not divide --parallel.workers {self.workers}")
        if self.offload == "optimizer" and fsdp2:
            raise SettingsError(
                "--parallel.offload optimizer is ZeRO's; fsdp2 has --parallel.offload weights, which takes all along"
            )
        if self.offload == "weights" and self.strategy in ("zero1", "zero2"):
            raise SettingsError(
                f"--parallel.offload weights wants them sharded, which {self.strategy} does not: take "
                "--parallel.strategy zero3 or fsdp2, or --parallel.offload optimizer"
            )

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray sets aside for one worker."""
        sizes = {"CPU": float(self.cpus_per_worker), "GPU": float(self.gpus_per_worker)}
        return {name: size for name, size in sizes.items() if size}


@dataclass(frozen=True)
class GuardSettings:
    """A step whose loss or gradient norm is no number, or more than `spike` times the median of the last hundred
    steps' (0 sees none), is left out, but for those whose gradient `optimizer.clip` lets through whole. The run stops
    where more than `most` of them were.
    """

    spike: float = 10.0
    most: int = 10


@dataclass(frozen=True)
class ComputeSettings:
    """How a step is computed, not what: memory and speed.

    `compile` fuses each block's operations; the first steps then take a minute. `recompute` keeps less of the forward
    pass for the backward pass, and computes it again: "selective" all but attention and the narrow matrix products,
    "full" everything inside of a block. `float8` multiplies in 8 bits in the language model's blocks, for speed alone:
    see float8.py; it pays compiled, and for rows of thousands of positions.
    """

    compile: bool = False
    recompute: Literal["nothing", "selective", "full"] = "nothing"
    float8: bool = False


@dataclass(frozen=True)
class CheckpointSettings:
    """The newest `keep` stay, and the `keep_best` with the lowest loss since the one before.

    `patience` is for how many seconds the writing of one is tried again before the run stops. Training goes on
    meanwhile.
    """

    every: int = 100
    keep: int = 3
    keep_best: int = 0
    patience: float = 600.0


@dataclass(frozen=True)
class EvaluationSettings:
    """Every `every` steps, and after the last, the loss on `dataset`, which jobs/ingest.py wrote of what is not trained
    on.

    `patience` ends the run after so many evaluations on end that none was better than the best before; 0 never does.
    """

    dataset: str = ""
    every: int = 100
    patience: int = 0


@dataclass(frozen=True)
class RunSettings:
    """`runs` is the URI under which the run's folder NAME lies; `tokenizer` that of a folder with qwen.tiktoken.

    The budget is `steps`, `tokens` (labelled positions), `epochs` or `minutes` of steps, whichever is spent first; None
    is no limit. `profile` are steps to be traced, into the run's folder profile/.
    """

    name: str
    runs: str = "out/runs"
    tokenizer: str = ""
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    steps: int | None = 1000
    tokens: int | None = None
    epochs: int | None = None
    minutes: float | None = None
    seed: int = 0
    log_every: int = 10
    profile: tuple[int, ...] = ()

    @property
    def budget(self) -> dict[str, float]:
        """The limits that are set."""
        limits = {"steps": self.steps, "tokens": self.tokens, "epochs": self.epochs, "minutes": self.minutes}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def check(self) -> None:
        """Raises SettingsError for what can be known before a worker starts."""
        for option, value, least in (
            *((name, limit, 1) for name, limit in self.budget.items() if name != "minutes"),
            ("evaluation.every", self.evaluation.every, 1),
            ("evaluation.patience", self.evaluation.patience, 0),
            ("parallel.shard", self.parallel.shard, 0),
            ("model.lora.r", self.model.lora.r, 0),
            ("model.lora.alpha", self.model.lora.alpha, 1),
            ("log-every", self.log_every, 1),
            ("data.rows-per-step", self.data.rows_per_step, 1),
            ("data.packs-per-row", self.data.packs_per_row, 1),
            ("parallel.workers", self.parallel.workers, 1),
            ("parallel.min-workers", self.parallel.fewest, 1),
            ("parallel.cpus-per-worker", self.parallel.cpus_per_worker, 1),
            ("parallel.gpus-per-worker", self.parallel.gpus_per_worker, 0),
            ("parallel.max-failures", self.parallel.max_failures, 0),
            ("parallel.hang-timeout", self.parallel.hang_timeout, 1),
            ("parallel.wait-for-resources", self.parallel.wait_for_resources, 0),
            ("data.pack-length", self.data.pack_length, 1),
            ("data.run-samples", self.data.run_samples, 1),
            ("data.window-runs", self.data.window_runs, 1),
            ("data.max-bad", self.data.max_bad, 0),
            ("optimizer.learning-rate", self.optimizer.learning_rate, 0),
            *((f"optimizer.learning-rates {name}", rate, 0) for name, rate in self.optimizer.learning_rates.items()),
            ("optimizer.weight-decay", self.optimizer.weight_decay, 0),
            ("guard.spike", self.guard.spike, 0),
            ("guard.most", self.guard.most, 0),
            ("checkpoint.every", self.checkpoint.every, 1),
            ("checkpoint.keep", self.checkpoint.keep, 1),
            ("checkpoint.keep-best", self.checkpoint.keep_best, 0),
            ("checkpoint.patience", self.checkpoint.patience, 0),
        ):
            if not value >= least:  # nan is not, either
                raise SettingsError(f"--{option} is {value}; at least {least} is needed")
        if self.parallel.fewest > self.parallel.workers:
            raise SettingsError(
                f"--parallel.min-workers is {self.parallel.fewest}; at most --parallel.workers {self.parallel.workers} "
                "is allowed"
            )
        if not 0 <= self.model.lora.dropout < 1:
            raise SettingsError(f"--model.lora.dropout is {self.model.lora.dropout}; from 0 to below 1 is allowed")
        for option, share in (("warmup", self.optimizer.warmup), ("cooldown", self.optimizer.cooldown)):
            if not 0 <= share <= 1:
                raise SettingsError(f"--optimizer.{option} is {share}; it is a share of the budget, from 0 to 1")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise SettingsError(f"--optimizer.betas are {self.optimizer.betas}; from 0 to below 1 is allowed")
        if not self.optimizer.clip > 0:
            raise SettingsError(f"--optimizer.clip is {self.optimizer.clip}; above 0 is needed, 1e9 clips nothing")
        if self.minutes is not None and not self.minutes > 0:
            raise SettingsError(f"--minutes is {self.minutes}; above 0 is needed")
        if not self.budget:
            raise SettingsError("the run has no end: set --steps, --tokens, --epochs or --minutes")
        if self.evaluation.patience and not self.evaluation.dataset:
            raise SettingsError("--evaluation.patience needs --evaluation.dataset, by whose loss it stops")
        self.parallel.check()
        if self.compute.float8:
            self._check_float8()
        if self.model.init_from and (self.tokenizer or self.model.config):
            option = "--tokenizer" if self.tokenizer else "--model.config (a recipe for fresh weights sets it)"
            raise SettingsError(
                f"{option} does not go with --model.init-from {self.model.init_from}: an artifact brings its own"
            )
        if not self.data.dataset and not self.data.mixture:
            raise SettingsError("--data.dataset is missing: give the URI of a dataset that jobs/ingest.py wrote")
        if self.data.dataset and self.data.mixture:
            raise SettingsError("--data.dataset does not go with --data.mixture: name it there, with its weight")
        if self.data.mixture and self.epochs is not None:
            raise SettingsError(
                "--epochs does not go with --data.mixture, whose datasets go through epochs of their own; "
                "set --steps, --tokens or --minutes"
            )
        for uri, weight in self.data.mixture.items():
            if not 0 < weight < float("inf"):
                raise SettingsError(f"--data.mixture gives {uri} the weight {weight}; more than 0 is needed")
        if not re.fullmatch(r"[\w-][\w.-]*", self.name):
            raise SettingsError(
                f"--name {self.name!r} must be a plain name, of letters, digits, - _ and dots: it becomes a folder "
                "under --runs"
            )

    def _check_float8(self) -> None:
        if self.model.precision != "bfloat16" or not self.parallel.gpus_per_worker:
            raise SettingsError(
                "--compute.float8 is for a GPU that computes in bfloat16 beside it: set --model.precision bfloat16 and "
                "--parallel.gpus-per-worker 1, or leave it out"
            )
        if self.parallel.strategy != "fsdp2":
            raise SettingsError(
                f"--compute.float8 is fsdp2's, {self.parallel.strategy} has none: set --parallel.strategy fsdp2, or "
                "leave it out"
            )
        if self.data.packs_per_row * self.data.pack_length % 16:
            raise SettingsError(
                f"--compute.float8 wants rows of a multiple of 16 positions; --data.pack-length "
                f"{self.data.pack_length} is none: take {-(-self.data.pack_length // 16) * 16}"
            )
