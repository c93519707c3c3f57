"""One request on its way through the engine."""

import hashlib
import math
import random
import time

import numpy as np

from mqwen.engine.grammar import Grammar
from mqwen.engine.outbox import Outbox
from mqwen.engine.pictures import Picture
from mqwen.engine.request import FinishReason, Request, TokenEvent, TokenLogprob
from mqwen.engine.text import TextStream


class Sequence:
    """State of one request. Made on its event loop; once it waits, the engine's thread changes it.

    ids: (prompt_tokens + limit,), what each position holds, a placeholder all through a picture's; `known` of them are
    filled in. length: known positions, and those whose token a step under way will give. computed: positions whose
    keys and values are, or will be after the steps under way, in `blocks`. row: its place in the runner's tables while
    it runs. alpha: rotary factor, fixed by the prompt, for ever. keys: what each full block holds, in a chain.
    live: the engine's thread has it, and it has not ended. aborted: nobody waits for it any more.
    token_seconds: what the newest token took, from the one before or, the first, from the request's arrival.
    """

    def __init__(
        self, request: Request, ids: np.ndarray, starts: list[int], limit: int, text: TextStream, outbox: Outbox
    ) -> None:
        """ids: the expanded prompt. starts: where its pictures begin."""
        self.request = request
        self.limit = limit
        self.prompt_tokens = self.known = self.length = len(ids)
        self.ids = np.concatenate((ids, np.zeros(limit, np.int64)))
        self.starts = starts
        self.pictures: list[Picture] = []
        self.grammar: Grammar | None = None
        self.seed = random.getrandbits(63) if request.seed is None else request.seed % (1 << 63)
        self.alpha = 1.0
        self.computed = 0
        self.row: int | None = None
        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        self.root = b""
        self.arrived = self._token_at = time.perf_counter()
        self.token_seconds = 0.0
        self._told_at = -math.inf
        self.finish_reason: FinishReason | None = None
        self.live = False
        self.aborted = False
        self.outbox = outbox
        self._text = text
        self._untold: tuple[list[int], list[str], list[TokenLogprob]] = ([], [], [])  # of what the next event tells

    @property
    def completion_tokens(self) -> int:
        return self.known - self.prompt_tokens

    @property
    def decodes(self) -> bool:
        """One position is left to work on, and a token may follow from it; the last token is only given out."""
        return self.length - self.computed == 1 and self.length < len(self.ids)

    def add(self, token: int, stop_ids: frozenset[int], logprob: TokenLogprob | None, pause: float) -> bool:
        """Takes a sampled token, which its grammar has taken; afterwards `finish_reason` says whether it was the last.

        True where its reader has an event to be told of: at the end, and, who streams, at the first token and then as
        often as `pause` seconds allow.
        """
        self.ids[self.known] = token
        self.known += 1
        now = time.perf_counter()
        self.token_seconds, self._token_at = now - self._token_at, now
        stops = not self.request.ignore_eos and (token in stop_ids or token in self.request.stop_ids)
        text = "" if stops else self._text.push(token)
        if stops or self._text.stopped or (self.grammar is not None and self.grammar.ended):
            self.finish_reason = "stop"
        elif self.known == len(self.ids):
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._text.flush()
        tokens, texts, logprobs = self._untold
        tokens.append(token)
        texts.append(text)
        if logprob is not None:
            logprobs.append(logprob)
        if self.finish_reason is None and not (self.outbox.streams and now - self._told_at >= pause):
            return False
        # Sequences that began together are told of one after the other, not all at once again and again.
        self._told_at = now - pause * random.random() if self.completion_tokens == 1 else now
        self._tell()
        return True

    def end_aborted(self) -> None:
        self.finish_reason = "abort"
        self._tell()

    def _tell(self) -> None:
        (tokens, texts, logprobs), counts = self._untold, (self.prompt_tokens, self.completion_tokens)
        self.outbox.put(TokenEvent(tuple(tokens), "".join(texts), self.finish_reason, *counts, tuple(logprobs)))
        for told in self._untold:
            told.clear()

    def pictures_between(self, start: int, stop: int, width: int) -> list[tuple[Picture, int]]:
        """Pictures of `width` positions that have some from `start` to `stop`, with their first position."""
        if start >= self.prompt_tokens:
            return []
        pairs = zip(self.pictures, self.starts, strict=True)
        return [(picture, at) for picture, at in pairs if at < stop and at + width > start]

    def drop_pictures(self, start: int, stop: int, width: int) -> None:
        """Features that are in the cache as a whole once `start` to `stop` are."""
        for picture, at in self.pictures_between(start, stop, width):
            if at + width <= stop:
                picture.features = None

    def extend_keys(self, blocks: int, size: int, width: int) -> None:
        """Keys of the first `blocks` blocks of `size` positions; a picture has `width` of them."""
        while len(self.keys) < blocks:
            start = len(self.keys) * size
            digest = hashlib.sha256(self.keys[-1] if self.keys else self.root)
            digest.update(self.ids[start : start + size].tobytes())
            for picture, at in self.pictures_between(start, start + size, width):
                digest.update(f" {at - start} {picture.key}".encode())
            self.keys.append(digest.digest())


def expand_pictures(ids: np.ndarray, image_token_id: int, width: int) -> tuple[np.ndarray, list[int]]:
    """Each placeholder `width` times, and where each one's first stands now."""
    if image_token_id not in ids:
        return ids, []
    repeats = np.where(ids == image_token_id, width, 1)
    first = np.cumsum(repeats) - repeats
    return np.repeat(ids, repeats), first[ids == image_token_id].tolist()
