"""`serve run serve.app:build checkpoint=URI [option=value ...]` from the repository root. Options: see settings.py."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingPolicy,
    BackpressureConfig,
    RequestRouterConfig,
)
from ray.serve.schema import LoggingConfig

from serve.ingress import Ingress, Policy
from serve.limits import KeyLimits, Limits
from serve.replica import ModelReplica
from serve.settings import ModelSettings, Settings
from serve.tracing import environment

LOOK_BACK = 15.0  # seconds of load that the number of replicas follows; Serve hears of it each ten
# The ingress asks replicas by gRPC, in one event loop: object references and three loops take it twice as long.
INGRESS = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
LOGS = LoggingConfig(encoding="JSON")  # each line with the request's id


def build(arguments: dict[str, Any]) -> Application:
    """The application: an ingress that speaks HTTP, and each model's replicas behind it. Raises SettingsError."""
    settings = Settings.from_arguments(arguments)
    # What can be at work or in a queue. More would be refused after all, and each that waits for it costs the ingress
    # 0.3 MB and its share of the time.
    room = sum(one.max_replicas * one.max_ongoing_requests + one.max_queued_requests for one in settings.models())
    own = {name: getattr(settings, name) for name in OF_POLICY}
    policy = Policy(key_hashes=settings.key_hashes(), max_requests=room, **own)
    models = {
        one.model: (_replicas(one, number, settings.max_seconds), tuple(one.adapters))
        for number, one in enumerate(settings.models())
    }
    # The ingress waits more than it computes: a fraction of a core, room for another beside it in an upgrade, and no
    # limit of its own before the replicas'.
    ingress = serve.deployment(
        Ingress,
        num_replicas=settings.ingress_replicas,
        max_surge_percent=100,
        ray_actor_options=_actor(INGRESS, num_cpus=0.1),
        max_ongoing_requests=1024,
        graceful_shutdown_timeout_s=settings.max_seconds,
        logging_config=LOGS,
    )
    return ingress.bind(models, policy, _limits(settings))


OF_POLICY = (
    "max_body_bytes",
    "max_pictures",
    "max_seconds",
    "max_picture_bytes",
    "picture_hosts",
    "picture_networks",
)


def _replicas(model: ModelSettings, number: int, drain: float) -> Application:
    """drain: seconds that requests which a replica works on may take to end, when it is to go."""
    deployment = serve.deployment(
        ModelReplica,
        name=f"ModelReplica{number + 1}" if number else "ModelReplica",
        ray_actor_options=_actor({}, num_cpus=model.cpus, num_gpus=model.gpus),
        autoscaling_config=AutoscalingConfig(
            min_replicas=model.min_replicas,
            max_replicas=model.max_replicas,
            initial_replicas=model.initial_replicas,
            target_ongoing_requests=model.max_ongoing_requests / 2,
            upscale_delay_s=model.upscale_delay,
            downscale_delay_s=model.downscale_delay,
            look_back_period_s=LOOK_BACK,
            policy=AutoscalingPolicy(
                policy_function="serve.scaling.RequestsAndCache",
                policy_kwargs={"target_kv_usage": model.target_kv_usage},
            ),
        ),
        max_ongoing_requests=model.max_ongoing_requests,
        max_queued_requests=model.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        request_router_config=RequestRouterConfig(request_router_class=ROUTERS[model.routing]),
        max_surge_percent=model.max_surge_percent,
        graceful_shutdown_timeout_s=drain,
        logging_config=LOGS,
    )
    return deployment.bind(model)


ROUTERS = {
    "affinity": "serve.routing.AffinityRouter",
    "random": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
}


def _actor(variables: dict[str, str], **resources: float) -> dict[str, Any]:
    variables = variables | environment()
    return resources | ({"runtime_env": {"env_vars": variables}} if variables else {})


def _limits(settings: Settings) -> Application | None:
    limits = Limits(settings.key_requests_per_minute, settings.key_concurrency, lease=settings.max_seconds)
    if limits.requests_per_minute is None and limits.concurrency is None:
        return None
    deployment = serve.deployment(
        KeyLimits,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
        max_surge_percent=100,
        logging_config=LOGS,
    )
    return deployment.bind(limits)
