"""The engine's runner on a card: decoding, and prompts of moderate length, by captured graphs."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mqwen.engine.cuda.graph import capture
from mqwen.engine.cuda.kernels import TILE, receive
from mqwen.engine.cuda.network import Network, Prompts, Tables
from mqwen.engine.cuda.network8 import Float8Network
from mqwen.engine.device import STEPS
from mqwen.engine.float8 import is_float8
from mqwen.engine.runner import Runner
from mqwen.engine.scheduler import Step, Work

# A graph is captured for each of these counts of sequences; a step runs by the next larger one.
COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# The same for tokens of prompts: as many as the host takes longer to launch than the card to work on.
TOKENS = (16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072)
PIECES = 32  # of prompts in a graph

Ints = NDArray[np.int64]


def counts_for(rows: int) -> list[int]:
    """Of sequences, for which graphs are captured: the last takes all rows."""
    return [count for count in COUNTS if count < rows] + [min((c for c in COUNTS if c >= rows), default=rows)]


class Graph:
    """`Network.decode` for a fixed number of sequences, captured once and replayed."""

    def __init__(self, network: Network, count: int, nobody: int, device: torch.device, pool: Any) -> None:
        self.count = count
        self._input = torch.zeros(3, count, dtype=torch.int64, device=device)
        self._input[0] = nobody
        self._hosts = cycle(torch.empty(STEPS, 3, count, dtype=torch.int64, pin_memory=True))
        self._nobody = nobody
        receive(next(self._hosts).copy_(self._input), self._input)  # compiles it
        self._graph, self._logits = capture(lambda: network.decode(*self._input), pool)

    def __call__(self, where: Ints) -> tuple[Tensor, Tensor, Tensor]:
        """(3, S), S up to `count`, rows, positions and their blocks: logits (S, V), good until the next call, and rows
        and positions on the device."""
        wanted = where.shape[1]
        host = next(self._hosts)
        shared = host.numpy()
        shared[:, :wanted] = where
        shared[0, wanted:], shared[1:, wanted:] = self._nobody, 0
        receive(host, self._input)
        self._graph.replay()
        return self._logits[:wanted], self._input[0, :wanted], self._input[1, :wanted]


class PromptStep:
    """`Network.prefill` of up to so many tokens, in up to so many pieces of prompts."""

    def __init__(self, network: Network, tokens: int, pieces: int, nobody: int, device: torch.device) -> None:
        self.tokens, self._nobody, self._network = tokens, nobody, network
        self._lengths = tokens, tokens, 2 * (tokens // TILE + pieces), pieces
        self._packed = torch.zeros(sum(self._lengths), dtype=torch.int64, device=device)
        rows, positions, tiles, last = self._packed.split(self._lengths)
        rows.fill_(nobody)
        self.prompts = Prompts(rows, positions, tiles.view(2, -1), last)
        self.x, self._turns = network.room(tokens)
        network.begin(rows, positions, self.x, self._turns)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def capture(self, pool: Any) -> PromptStep:
        """Once, to be replayed; the logits are good until the next time."""
        self._graph, self._logits = capture(self._prefill, pool)
        return self

    def begin(self, rows: Ints, starts: Ints, counts: Ints, samples: NDArray[np.bool_]) -> None:
        """rows, starts, counts: of each piece; samples: whether a token follows from it. Fills x with embeddings."""
        packed = np.zeros(len(self._packed), np.int64)
        token_rows, positions, tiles, last = np.split(packed, np.cumsum(self._lengths)[:-1])
        firsts, total = np.cumsum(counts) - counts, counts.sum()
        token_rows[:total], token_rows[total:] = np.repeat(rows, counts), self._nobody
        positions[:total] = np.repeat(starts - firsts, counts) + np.arange(total)
        per = -(-counts // TILE)
        tile_firsts, tile_counts = tiles.reshape(2, -1)[:, : per.sum()]
        tile_firsts[:] = np.repeat(firsts, per) + TILE * (np.arange(per.sum()) - np.repeat(np.cumsum(per) - per, per))
        tile_counts[:] = np.minimum(TILE, np.repeat(firsts + counts, per) - tile_firsts)
        last[: samples.sum()] = (firsts + counts - 1)[samples]
        sent = torch.from_numpy(packed)
        self._packed.copy_(sent.pin_memory() if self._packed.is_cuda else sent, non_blocking=True)
        self._network.begin(self.prompts.rows, self.prompts.positions, self.x, self._turns)

    def logits(self) -> Tensor:
        """(pieces, V), those that sample first."""
        if self._graph is None:
            return self._prefill()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _prefill(self) -> Tensor:
        return self._network.prefill(self.x, self._turns, self.prompts)


class CudaRunner(Runner):
    """Steps without adapters run by kernels of their own; those with some as on every other device."""

    def __init__(self, *arguments: Any, rows: int, size: int, **settings: Any) -> None:
        super().__init__(*arguments, rows=rows + 1, size=size, **settings)  # the last row is nobody's
        self._width = self._model.config.image_positions
        tables = Tables(
            self.ids, self._blocks, self._rotary_places, self.rotary.angles, self.rotary.logn, self._cache.size
        )
        kind = Float8Network if is_float8(self._model) else Network
        self._network = kind(self._model, self._cache.layers, tables)
        self._nobody = rows
        pool = torch.cuda.graph_pool_handle()
        self._graphs = [Graph(self._network, count, rows, self._device, pool) for count in reversed(counts_for(rows))][
            ::-1
        ]
        self._prompt_steps = [self._prompt_step(tokens, PIECES).capture(pool) for tokens in reversed(TOKENS)][::-1]

    def _prompt_step(self, tokens: int, pieces: int) -> PromptStep:
        return PromptStep(self._network, tokens, pieces, self._nobody, self._device)

    def prepare(self, step: Step) -> None:
        """Graphs write the new blocks of who decodes themselves."""
        super().prepare(step if _adapted(step.works) else replace(step, grown=[]))

    def forward(self, works: Many[Work]) -> tuple[Tensor, Tensor, Tensor]:
        if _adapted(works):
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
        size = self._cache.size
        where = np.array([(work.sequence.row, work.start, work.sequence.blocks[work.start // size]) for work in works])
        graph = next(graph for graph in self._graphs if graph.count >= len(works))
        logits, rows, positions = graph(where.T)
        return logits, rows, positions + 1

    def _prefill(self, works: Many[Work]) -> tuple[Tensor, Tensor, Tensor]:
        rows = np.array([work.sequence.row for work in works])
        starts = np.array([work.start for work in works])
        counts = np.array([work.stop for work in works]) - starts
        samples = np.array([work.samples for work in works])
        tokens, pieces = int(counts.sum()), len(works)
        fitting = (step for step in self._prompt_steps if step.tokens >= tokens and pieces <= PIECES)
        step = next(fitting, None) or self._prompt_step(tokens, pieces)
        step.begin(rows, starts, counts, samples)
        self._put_pictures(step.x, works, np.cumsum(counts) - counts)
        logits = step.logits()[: samples.sum()]
        last = step.prompts.last[: samples.sum()]
        return logits, step.prompts.rows[last], step.prompts.positions[last] + 1


def _adapted(works: Many[Work]) -> bool:
    return any(work.sequence.request.adapter for work in works)
