"""Pictures of requests: decoded off the event loop, encoded in batches, kept by content hash.

Shapes: N pictures, P image positions of one picture, E hidden size, S edge of the vision tower's input in pixels.
"""

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mqwen.engine.adapters import Adapters
from mqwen.engine.request import InvalidPictureError

if TYPE_CHECKING:
    from mqwen.model import MQWenLMHeadModel, MQWenProcessor

Source = bytes | NDArray[np.uint8]


@dataclass(slots=True, eq=False)
class Picture:
    """One picture of a request.

    key: hash of its content. pixels: uint8 (3, S, S); None where its features were cached when the request came.
    features: (P, E), as long as its positions are being worked on. ready: of the features, on a card.
    """

    key: str
    source: Source
    pixels: NDArray[np.uint8] | None = None
    features: Tensor | None = None
    ready: torch.cuda.Event | None = None

    def take(self) -> Tensor:
        """The features, for work of the current stream."""
        assert self.features is not None
        if self.ready is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.ready)
            self.features.record_stream(stream)
        return self.features


class PictureEncoder:
    """Features (P, E) for pictures. `load` belongs to event loops, `encode` to the thread that owns the model."""

    def __init__(
        self,
        model: "MQWenLMHeadModel",
        processor: "MQWenProcessor",
        adapters: Adapters,
        *,
        threads: int,
        batch: int,
        cache_bytes: int,
    ) -> None:
        self._model, self._processor, self._adapters = model, processor, adapters
        self._encode_images: Callable[[Tensor], Tensor] = model.encode_images
        self._stream: torch.cuda.Stream | None = None
        if model.device.type == "cuda":
            from mqwen.engine.cuda.pictures import PictureGraphs

            self._encode_images = graphs = PictureGraphs(model, batch)
            self._stream = graphs.stream
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="picture")
        self._batch = batch
        self.cache = FeatureCache(cache_bytes)
        self.version = ""  # of the weights
        self.encoded = self.reused = 0  # distinct pictures of each step

    async def load(self, pictures: Sequence[Source], adapter: str | None) -> list[Picture]:
        """Decodes and resizes in threads. Raises InvalidPictureError, which names the picture by its place."""
        run = asyncio.get_running_loop().run_in_executor
        return await asyncio.gather(
            *(run(self._pool, self._load, source, index, adapter) for index, source in enumerate(pictures))
        )

    def _load(self, source: Source, index: int, adapter: str | None) -> Picture:
        content = source if isinstance(source, bytes) else b"pixels" + source.tobytes()
        picture = Picture(hashlib.sha256(content).hexdigest(), source)
        if self.cache.get(self._cached_as(picture, adapter)) is None:
            try:
                picture.pixels = self._pixels(source)
            except ValueError as error:
                raise InvalidPictureError(f"Picture {index + 1}: {error}", param=f"pictures[{index}]") from error
        return picture

    def _pixels(self, source: Source) -> NDArray[np.uint8]:
        if isinstance(source, bytes):
            return self._processor.pixels(source)
        size = self._processor.image_size
        if source.shape != (3, size, size) or source.dtype != np.uint8:
            raise ValueError(f"pixels must be uint8 (3, {size}, {size}), not {source.dtype} {source.shape}")
        return source

    def _cached_as(self, picture: Picture, adapter: str | None) -> str:
        return f"{self.version} {adapter if self._adapters.change_pictures(adapter) else ''} {picture.key}"

    def encode(self, pictures: Sequence[tuple[Picture, str | None]]) -> None:
        """Gives each picture, with the adapter of its request, its features on the model's device.

        A card does this beside the work of the current stream.
        """
        if self._stream is None:
            self._encode_all(pictures)
            return
        with torch.cuda.stream(self._stream):
            self._encode_all(pictures)
            ready = self._stream.record_event()
        for picture, _ in pictures:
            picture.ready = ready

    def _encode_all(self, pictures: Sequence[tuple[Picture, str | None]]) -> None:
        wanted = {self._cached_as(picture, adapter): (picture, adapter) for picture, adapter in pictures}
        known = {name: features for name in wanted if (features := self.cache.get(name)) is not None}
        missing = [(name, *one) for name, one in wanted.items() if name not in known]
        self.reused += len(known)
        self.encoded += len(missing)
        missing.sort(key=lambda one: one[0])  # pictures of one adapter side by side
        for own, group in groupby(missing, key=lambda one: one[2] if self._adapters.change_pictures(one[2]) else None):
            named = [(name, picture) for name, picture, _ in group]
            for start in range(0, len(named), self._batch):
                known |= self._encode(named[start : start + self._batch], own)
        for picture, adapter in pictures:
            picture.features = known[self._cached_as(picture, adapter)]

    def _encode(self, named: list[tuple[str, Picture]], adapter: str | None) -> dict[str, Tensor]:
        # Decoded here where the features were cached when the request came, and have left since.
        pixels = [self._pixels(one.source) if one.pixels is None else one.pixels for _, one in named]
        encode = self._encode_images if adapter is None else self._model.encode_images
        with self._adapters.for_pictures(adapter):
            encoded = encode(torch.from_numpy(np.stack(pixels)))
        return {name: self.cache.put(name, one) for (name, _), one in zip(named, encoded, strict=True)}

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class FeatureCache:
    """Least recently used features leave when the bound is reached. Safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._entries: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._max_bytes = max_bytes
        self.bytes = 0

    def get(self, key: str) -> Tensor | None:
        with self._lock:
            feature = self._entries.get(key)
            if feature is not None:
                self._entries.move_to_end(key)
            return feature

    def put(self, key: str, feature: Tensor) -> Tensor:
        """Gives the copy that it keeps: a view would keep the whole encoded batch alive."""
        feature = feature.clone()
        with self._lock:
            if key in self._entries:
                return feature
            self._entries[key] = feature
            self.bytes += feature.nbytes
            while self.bytes > self._max_bytes:
                _, old = self._entries.popitem(last=False)
                self.bytes -= old.nbytes
        return feature
