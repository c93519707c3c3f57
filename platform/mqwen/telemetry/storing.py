"""Storage: what every process emits of the object storage that it works on."""

from mqwen.telemetry.metric import Counter

FAILED_REQUESTS = Counter(
    "mqwen_storage_failed_requests",
    "Requests that storage refused after its client's own attempts; most are tried again.",
    unit="requests",
)
