"""`serve run serve.app:build checkpoint=URI [option=value ...]` from the repository root. Options: see settings.py."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from serve.ingress import Ingress, Policy
from serve.replica import ModelReplica
from serve.settings import Settings


def build(arguments: dict[str, Any]) -> Application:
    """The application: an ingress that speaks HTTP, and model replicas behind it. Raises SettingsError."""
    settings = Settings.from_arguments(arguments)
    policy = Policy(
        model=settings.model,
        key_hashes=settings.key_hashes(),
        max_body_bytes=settings.max_body_bytes,
        max_pictures=settings.max_pictures,
    )
    replicas = serve.deployment(
        ModelReplica,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            initial_replicas=settings.initial_replicas,
            target_ongoing_requests=settings.max_ongoing_requests / 2,
        ),
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
    )
    # The ingress waits more than it computes: a fraction of a core, and no limit of its own before the replicas'.
    ingress = serve.deployment(Ingress, ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1024)
    return ingress.bind(replicas.bind(settings.checkpoint, settings.model, settings.gpus > 0), policy)
