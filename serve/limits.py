"""Rate and concurrency of each API key, counted in one place for all ingress replicas."""

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from ray.serve.handle import DeploymentHandle

MINUTE = 60.0  # seconds
PATIENCE = 10.0  # seconds that the count may take


@dataclass(frozen=True)
class Limits:
    """Of one key. None is no limit. lease: seconds after which a request counts as ended, whatever became of it."""

    requests_per_minute: int | None
    concurrency: int | None
    lease: float


@dataclass(frozen=True)
class Refusal:
    """retry_after: seconds."""

    reason: str
    code: str
    retry_after: int


class KeyLimits:
    """A deployment of one replica. What an ingress that died had let in ends with its lease; an upgrade counts anew."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._begun: defaultdict[str, deque[float]] = defaultdict(deque)  # by key: when, in the last minute
        self._running: defaultdict[str, dict[str, float]] = defaultdict(dict)  # by key: when each request's lease ends

    async def enter(self, key: str, request: str) -> Refusal | None:
        """Counts a request, unless it is one too many."""
        now, limits = self._clock(), self._limits
        running, begun = self._running[key], self._begun[key]
        for old in [one for one, end in running.items() if end <= now]:
            del running[old]
        while begun and begun[0] <= now - MINUTE:
            begun.popleft()
        if limits.concurrency is not None and len(running) >= limits.concurrency:
            reason = f"This API key has {len(running)} requests under way; {limits.concurrency} are allowed at once."
            return Refusal(reason, "concurrency_limit_exceeded", 1)
        if limits.requests_per_minute is not None:
            if len(begun) >= limits.requests_per_minute:
                reason = f"This API key has had the {limits.requests_per_minute} requests a minute that it may have."
                return Refusal(reason, "rate_limit_exceeded", math.ceil(begun[0] + MINUTE - now))
            begun.append(now)
        running[request] = now + limits.lease
        return None

    async def leave(self, key: str, request: str) -> None:
        self._running[key].pop(request, None)
        if not self._running[key]:
            del self._running[key]


class LimitsHandle:
    """KeyLimits as the ingress has it, through Serve."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def enter(self, key: str, request: str) -> Refusal | None:
        """Where nobody counts, nobody enters: then this is a refusal too."""
        try:
            return await asyncio.wait_for(self._handle.enter.remote(key, request), PATIENCE)
        except Exception:  # it is being replaced, or has no room
            return Refusal("The limits of API keys cannot be checked now. Try again.", "limits_unavailable", 1)

    async def leave(self, key: str, request: str) -> None:
        self._handle.leave.remote(key, request)
