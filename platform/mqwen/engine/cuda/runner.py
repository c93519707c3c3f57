"""The engine's runner on a card: decoding by captured graphs, prompts by the variable-length kernel."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mqwen.engine.cuda.network import Network, Prompts, Tables
from mqwen.engine.runner import Runner
from mqwen.engine.scheduler import Work

# A graph is captured for each of these counts of sequences; a step runs by the next larger one.
COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


class Graph:
    """`Network.decode` for a fixed number of sequences, captured once and replayed."""

    def __init__(self, network: Network, count: int, nobody: int, device: torch.device, pool: Any) -> None:
        self.count = count
        self._input = torch.empty(2, count, dtype=torch.int64, device=device)
        self._input[0], self._input[1] = nobody, 0
        self._nobody = nobody
        self._graph = torch.cuda.CUDAGraph()
        network.decode(*self._input)  # compiles what it needs
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, pool=pool):
            self._logits = network.decode(*self._input)

    def __call__(self, rows_and_positions: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """(2, S), S up to `count`: logits (S, V), good until the next call, rows and positions on the device."""
        wanted = rows_and_positions.shape[1]
        host = torch.zeros(2, self.count, dtype=torch.int64, pin_memory=True)
        host[0] = self._nobody
        host[:, :wanted] = torch.from_numpy(rows_and_positions)
        self._input.copy_(host, non_blocking=True)
        self._graph.replay()
        return self._logits[:wanted], self._input[0, :wanted], self._input[1, :wanted]


class CudaRunner(Runner):
    """Steps without adapters run by kernels of their own; those with some as on every other device."""

    def __init__(self, *arguments: Any, rows: int, size: int, **settings: Any) -> None:
        super().__init__(*arguments, rows=rows + 1, size=size, **settings)  # the last row is nobody's
        self._width = self._model.config.image_positions
        tables = Tables(
            self.ids, self._blocks, self._rotary_places, self.rotary.angles, self.rotary.logn, self._cache.size
        )
        self._network = Network(self._model, self._cache.layers, tables)
        pool = torch.cuda.graph_pool_handle()
        self._graphs = [
            Graph(self._network, count, rows, self._device, pool)
            for count in reversed([count for count in COUNTS if count < rows] + [min(c for c in COUNTS if c >= rows)])
        ][::-1]

    def forward(self, works: Many[Work]) -> tuple[Tensor, Tensor, Tensor]:
        if any(work.sequence.request.adapter for work in works):
            return super().forward(works)
        singles = next((place for place, work in enumerate(works) if not self._decodes(work)), len(works))
        parts = [self._decode(works[:singles])] if singles else []
        if singles < len(works):
            parts.append(self._prefill(works[singles:]))
        if len(parts) == 1:
            return parts[0]
        logits, rows, positions = zip(*parts, strict=True)
        return torch.cat(logits), torch.cat(rows), torch.cat(positions)

    def _decodes(self, work: Work) -> bool:
        """One position that samples, and is no picture's."""
        one = work.samples and work.stop - work.start == 1
        return one and not any(work.sequence.pictures_between(work.start, work.stop, self._width))

    def _decode(self, works: Many[Work]) -> tuple[Tensor, Tensor, Tensor]:
        where = np.array([(work.sequence.row, work.start) for work in works]).T
        graph = next(graph for graph in self._graphs if graph.count >= len(works))
        logits, rows, positions = graph(where)
        return logits, rows, positions + 1

    def _prefill(self, works: Many[Work]) -> tuple[Tensor, Tensor, Tensor]:
        rows = np.array([work.sequence.row for work in works])
        starts = np.array([work.start for work in works])
        stops = np.array([work.stop for work in works])
        counts = stops - starts
        firsts, contexts = np.cumsum(counts) - counts, np.cumsum(stops) - stops
        token_rows, positions = self._send(
            np.stack((np.repeat(rows, counts), np.repeat(starts - firsts, counts) + np.arange(counts.sum())))
        )
        key_rows, key_positions = self._send(
            np.stack((np.repeat(rows, stops), np.arange(stops.sum()) - np.repeat(contexts, stops)))
        )
        offsets = self._send(
            np.stack((np.append(firsts, counts.sum()), np.append(contexts, stops.sum()))).astype(np.int32)
        )
        size = self._cache.size
        slots = self._blocks[token_rows, positions // size] * size + positions % size
        context = self._blocks[key_rows, key_positions // size] * size + key_positions % size
        plan = Prompts(
            positions, slots, context, offsets[0], offsets[1], int(counts.max()), int(stops.max())
        )  # fmt: skip
        hidden = self._model.transformer.wte(self.ids[token_rows, positions])
        self._put_pictures(hidden, works, firsts)
        turns = self.rotary.angles[self._rotary_places[token_rows] + positions]
        normed = self._network.prefill(hidden, turns, plan)
        samples = np.array([work.samples for work in works])
        last = self._send((firsts + counts - 1)[samples])
        return self._network.logits(normed[last]), token_rows[last], positions[last] + 1
