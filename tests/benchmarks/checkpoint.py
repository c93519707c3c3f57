"""What a checkpoint costs the training: the stall of one written beside it, beside what writing it takes.

python -m tests.benchmarks.checkpoint [--hidden 768] [--layers 8] [--times 5]

Two processes train a model over gloo. By turns they wait for a checkpoint to be committed, as a synchronous one would,
and go on as soon as the state is copied. The steps beside it are timed too.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro

from mqwen.demo.storage import Storage, stored
from mqwen.model import MQWenConfig, MQWenLMHeadModel
from mqwen.storage import locate
from mqwen.train.loop import Progress
from mqwen.train.saver import Saver
from mqwen.train.settings import RunSettings
from mqwen.train.strategy import Strategy, make_strategy
from tests.benchmarks.result import write_result

WORKERS = 2


@dataclass(frozen=True)
class Sizes:
    """`hidden` and `layers` of the language model, a checkpoint of which is written `times` times each way."""

    hidden: int = 768
    layers: int = 8
    times: int = 5


def main() -> None:
    sizes = tyro.cli(Sizes, description=__doc__)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for storage in get_args(Storage):
            with stored(storage, Path(folder)) as place:
                mp.spawn(measure, (sizes, f"{place}/runs", folder), nprocs=WORKERS)
            rows.append(f"| {storage} | {(Path(folder) / 'row').read_text()} |")
            (Path(folder) / "meeting").unlink()
    head = (
        "| storage | a rank's state | synchronous | stall | share | process grew by | step | step beside |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    write_result(
        "checkpoint",
        head + "\n".join(rows) + "\n\nMedians; at most 10 % is aimed at. The copy is as large "
        "as a rank's state; the process grows by what earlier steps have not left free.",
    )


def measure(rank: int, sizes: Sizes, runs: str, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, timeout=timedelta(minutes=5), rank=rank, world_size=WORKERS)
    settings = RunSettings(name="run", runs=runs)
    config = MQWenConfig(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        kv_channels=64,
        intermediate_size=sizes.hidden * 4,
        vocab_size=4096,
        image_token_id=4000,
        vision_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    torch.manual_seed(0)
    model = MQWenLMHeadModel(config)
    strategy = make_strategy(model, list(model.transformer.h), settings)
    saver, process, number = Saver(locate(runs) / "run", settings), psutil.Process(), 0
    found: dict[str, list[float]] = {name: [] for name in ("synchronous", "stall", "memory", "step", "step beside")}
    for _ in range(sizes.times):
        for waits in (True, False):
            number += 1
            found["step"].append(step(strategy))
            dist.barrier()
            before, started = process.memory_info().rss, time.perf_counter()
            saver.save(strategy.state(), Progress(number, (0, 0, number)))
            found["memory"].append(process.memory_info().rss - before)
            if waits:
                saver.wait()
            found["synchronous" if waits else "stall"].append(time.perf_counter() - started)
            while saver.busy():
                found["step beside"].append(step(strategy))
    saver.wait()
    if rank == 0:
        one = {name: statistics.median(values) for name, values in found.items()}
        bytes_of_state = sum(local_bytes(value) for value in leaves(strategy.state()))
        share = one["stall"] / one["synchronous"]
        cells = [f"{bytes_of_state >> 20} MiB", f"{one['synchronous']:.2f} s", f"{one['stall']:.3f} s", f"{share:.1%}"]
        cells += [f"{int(max(found['memory'])) >> 20} MiB", f"{one['step']:.2f} s", f"{one['step beside']:.2f} s"]
        (Path(folder) / "row").write_text(" | ".join(cells))
    dist.destroy_process_group()


def step(strategy: Strategy) -> float:
    """Seconds of a training step on one short row."""
    started = time.perf_counter()
    ids = torch.randint(0, 4000, (1, 64))
    strategy.backward(strategy.model(input_ids=ids, labels=ids, use_cache=False).loss, last=True)
    strategy.step()
    return time.perf_counter() - started


def leaves(state: Any) -> list[torch.Tensor]:
    if isinstance(state, dict):
        return [leaf for value in state.values() for leaf in leaves(value)]
    return [state] if isinstance(state, torch.Tensor) else []


def local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


if __name__ == "__main__":
    main()
