"""Pictures encoded by captured graphs, on a stream of their own: decoding goes on beside them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mqwen.engine.cuda.graph import capture

if TYPE_CHECKING:
    from mqwen.model import MQWenLMHeadModel


class PictureGraphs:
    """`encode_images` of up to `most` pictures at once: one graph for each power of two."""

    def __init__(self, model: MQWenLMHeadModel, most: int) -> None:
        self.stream = torch.cuda.Stream(model.device)
        size = model.config.vision_config.image_size
        counts = [1 << power for power in range((most - 1).bit_length() + 1)]
        pool = torch.cuda.graph_pool_handle()
        self._graphs: list[tuple[Tensor, torch.cuda.CUDAGraph, Tensor]] = []
        for count in reversed(counts):  # the largest first: the others find room in its memory
            pixels = torch.zeros(count, 3, size, size, dtype=torch.uint8, device=model.device)
            self._graphs.insert(0, (pixels, *capture(partial(model.encode_images, pixels), pool)))

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, P, E) for (N, 3, S, S) on the host, good until the next call. Work of the current stream."""
        wanted = len(pixels)
        given, graph, features = next(one for one in self._graphs if len(one[0]) >= wanted)
        given[:wanted].copy_(pixels.pin_memory(), non_blocking=True)
        graph.replay()
        return features[:wanted]
