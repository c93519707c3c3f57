"""Pictures of requests: decoded off the event loop, encoded in batches, kept by content hash.

Shapes: N pictures, P image positions of one picture, E hidden size, S edge of the vision tower's input in pixels.
"""

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mqwen.engine.request import InvalidPictureError

if TYPE_CHECKING:
    from mqwen.model import MQWenLMHeadModel, MQWenProcessor


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One picture of a request: its features (P, E) where they were cached, else its pixels, uint8 (3, S, S)."""

    key: str
    pixels: NDArray[np.uint8] | None = None
    features: Tensor | None = None


class PictureEncoder:
    """Features (P, E) for pictures. `load` belongs to event loops, `encode` to the thread that owns the model."""

    def __init__(
        self, model: "MQWenLMHeadModel", processor: "MQWenProcessor", *, threads: int, batch: int, cache_bytes: int
    ) -> None:
        self._model, self._processor = model, processor
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="picture")
        self._batch = batch
        self.cache = FeatureCache(cache_bytes)
        self.encoded = self.reused = 0  # distinct pictures of each batch

    async def load(self, pictures: Sequence[bytes | NDArray[np.uint8]]) -> list[Picture]:
        """Decodes and resizes in threads. Raises InvalidPictureError, which names the picture by its place."""
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(self._pool, self._load, *at) for at in enumerate(pictures)))

    def _load(self, index: int, source: bytes | NDArray[np.uint8]) -> Picture:
        if isinstance(source, bytes):
            key = hashlib.sha256(source).hexdigest()
            if (features := self.cache.get(key)) is not None:
                return Picture(key, features=features)
            try:
                return Picture(key, pixels=self._processor.pixels(source))
            except ValueError as error:
                raise InvalidPictureError(f"Picture {index + 1}: {error}", param=f"pictures[{index}]") from error
        size = self._processor.image_size
        if source.shape != (3, size, size) or source.dtype != np.uint8:
            message = (
                f"Picture {index + 1}: pixels must be uint8 (3, {size}, {size}), not {source.dtype} {source.shape}"
            )
            raise InvalidPictureError(message, f"pictures[{index}]")
        key = hashlib.sha256(b"pixels" + source.tobytes()).hexdigest()
        return Picture(key, pixels=source, features=self.cache.get(key))

    def encode(self, pictures: Iterable[Picture]) -> dict[str, Tensor]:
        """Features of each distinct picture, by key: (P, E) on the model's device."""
        wanted = {picture.key: picture for picture in pictures}
        features: dict[str, Tensor] = {}
        for key, picture in wanted.items():
            # Asked once more: another batch may have encoded it since it was loaded.
            known = self.cache.get(key) if picture.features is None else picture.features
            if known is not None:
                features[key] = known
        missing = [picture for key, picture in wanted.items() if key not in features]
        self.reused += len(features)
        self.encoded += len(missing)
        for start in range(0, len(missing), self._batch):
            group = missing[start : start + self._batch]
            pixels = torch.from_numpy(np.stack([picture.pixels for picture in group if picture.pixels is not None]))
            encoded = self._model.encode_images(pixels.to(self._model.device))
            for picture, feature in zip(group, encoded, strict=True):
                features[picture.key] = feature
                self.cache.put(picture.key, feature)
        return features

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

    def put(self, key: str, feature: Tensor) -> None:
        feature = feature.clone()  # a view would keep the whole encoded batch alive
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = feature
            self.bytes += feature.nbytes
            while self.bytes > self._max_bytes:
                _, old = self._entries.popitem(last=False)
                self.bytes -= old.nbytes
