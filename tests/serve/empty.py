"""A Serve application that does nothing, to compare a restart with: `tests.serve.empty:app`."""

from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.25})
class Empty:
    def __call__(self, request: Request) -> str:
        return "ready"


app = Empty.bind()
