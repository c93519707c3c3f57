"""Timing on the device, and the ceilings that all else is held against."""

from __future__ import annotations

import gc
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

DATASHEET = 989e12  # FLOP/s of an H200 in dense bf16


@dataclass(frozen=True)
class Ceilings:
    """`product`: FLOP/s of a bf16 matrix product, the mean of ten after three to warm up; `sustained`: over seconds;
    `copy`: bytes read and written a second."""

    product: float
    sustained: float
    copy: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: torch.device, warm: int = 3, times: int = 10) -> float:
    """Mean seconds of a call, by the host's clock around calls that queue up on the device."""
    for _ in range(warm):
        work()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / times


def ceilings(device: torch.device, size: int, lasting: float) -> Ceilings:
    """Of size x size matrices; the sustained rate over `lasting` seconds."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    once = seconds(lambda: a @ b, device)
    sustained = seconds(lambda: a @ b, device, warm=0, times=max(1, round(lasting / once)))
    source = torch.empty(2 * size**2 * 16, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = seconds(lambda: target.copy_(source), device)
    return Ceilings(2 * size**3 / once, 2 * size**3 / sustained, 2 * source.numel() / copied)


def attempt(name: str, work: Callable[[], Any]) -> Any:
    """What `work` returns, or None where it fails, which is said on one line: other measurements go on."""
    try:
        return work()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        print(f"{name}: FAILED {type(error).__name__}: {text} ({place.filename}:{place.lineno})", flush=True)
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were measured on."""
    import transformers

    known = {"torch": torch.__version__, "transformers": transformers.__version__, "device": str(device)}
    if device.type == "cuda":
        known |= {
            "device": torch.cuda.get_device_name(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
        }
        asked = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        known["driver, power limit, clock"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return known


@contextmanager
def profiled() -> Iterator[torch.profiler.profile]:
    """Records kernels; on a CPU, operators."""
    cuda = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, acc_events=True) as trace:
        yield trace
        if cuda:
            torch.cuda.synchronize()


def print_kernels(trace: torch.profiler.profile, times: int, most: int) -> None:
    """Those that took most, by time of one of `times`, and what all took."""
    cuda = torch.cuda.is_available()
    took = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total, e.count) for e in trace.key_averages()}
    print(f"    {sum(spent for spent, _ in took.values()) / times / 1e3:9.3f} ms  all", flush=True)
    for name, (spent, count) in sorted(took.items(), key=lambda one: -one[1][0])[:most]:
        print(f"    {spent / times / 1e3:9.3f} ms  {count / times:7.1f} x  {name[:110]}", flush=True)
