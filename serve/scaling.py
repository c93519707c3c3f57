"""How many replicas a model needs: by its requests, running and waiting, and by how full their KV caches are."""

from typing import Any

from ray.serve.config import AutoscalingContext


class RequestsAndCache:
    """Serve calls it again and again; its limits, delays and factors apply to what it says.

    target_kv_usage: share of a replica's KV cache. Long conversations and pictures fill the cache long before there
    are many of them.
    """

    def __init__(self, target_kv_usage: float) -> None:
        self._target = target_kv_usage

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        by_requests = context.total_num_requests / context.config.get_target_ongoing_requests()
        usage = (context.aggregated_metrics or {}).get("kv_usage", {})
        return max(by_requests, sum(usage.values()) / self._target), {}
