"""How fast a device can be at best, and how much it holds: from datasheets, or measured where there is none."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch

SIDE = 1024  # of the square matrices that are multiplied where no datasheet helps
TRIES = 3
REACHED = 0.45  # of a datasheet's rate, by model computations on packed rows: what plans take


@dataclass(frozen=True)
class Card:
    """Operations a second of bfloat16 matrix products without sparsity, and memory in bytes, as the datasheet has
    them."""

    flops: float
    memory: float


CARDS = {
    "B200": Card(2250e12, 180e9),
    "H200": Card(989e12, 141e9),
    "H100 PCIe": Card(756e12, 80e9),
    "H100": Card(989e12, 80e9),
    "A100": Card(312e12, 80e9),
    "L40S": Card(362e12, 48e9),
    "L4": Card(121e12, 24e9),
    "A10": Card(125e12, 24e9),
}


@dataclass(frozen=True)
class Ceiling:
    """Operations a second that a run's are compared with, and where the number is from."""

    flops: float
    source: str


def ceiling(device: torch.device, precision: str) -> Ceiling:
    """A known card's datasheet rate for bfloat16; for all else what a matrix product reaches now, on this device."""
    if device.type == "cuda" and precision == "bfloat16":
        name = torch.cuda.get_device_name(device)
        for card, sheet in CARDS.items():  # longer names come before those that they begin with
            if card in name:
                return Ceiling(sheet.flops, f"{card}'s datasheet: {sheet.flops / 1e12:,.0f} TFLOP/s")
    return _measured(device, getattr(torch, precision))


def _measured(device: torch.device, dtype: torch.dtype) -> Ceiling:
    a, b = (torch.ones(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(TRIES):
        started = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    flops = 2 * SIDE**3 / best
    kind = str(dtype).removeprefix("torch.")
    return Ceiling(flops, f"a {kind} product of {SIDE}³ measured on this {device.type}: {flops / 1e12:,.3f} TFLOP/s")


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held on the device so far; on a CPU, in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
