"""What of a traced step's communication nothing hid."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

Span = tuple[float, float]  # from, to


@dataclass(frozen=True)
class Communication:
    """Seconds of rank 0's traced step: from its first kernel to the end of its last; in which some collective was at
    work; and in which a collective was, and nothing else. Waiting for a slower rank counts as communication."""

    step: float
    all: float
    exposed: float


def communication(trace: Path) -> Communication | None:
    """None where the trace has no kernels, as a CPU's."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    kernels = [(one["name"], (one["ts"], one["ts"] + one["dur"])) for one in events if one.get("cat") == "kernel"]
    if not kernels:
        return None
    theirs = union(span for name, span in kernels if "nccl" in name.lower())
    ours = union(span for name, span in kernels if "nccl" not in name.lower())
    both = union([*theirs, *ours])
    step = both[-1][1] - both[0][0]
    return Communication(step / 1e6, length(theirs) / 1e6, (length(both) - length(ours)) / 1e6)


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time, as spans that do not meet."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def length(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)
