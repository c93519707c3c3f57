"""Work of the card, captured once and replayed: the host launches it as one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def capture(work: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of the work, and what a replay of it fills. pool: memory that all graphs with it share."""
    graph = torch.cuda.CUDAGraph()
    work()  # compiles what it needs
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return graph, result
