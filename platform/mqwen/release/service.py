"""The applications of a Ray Serve instance, through its REST API, as `serve deploy` speaks to it.

Of a model's applications one stands at the route that clients use: the live one. A candidate stands beside it, at a
route of its own; so does, after the switch, the one before it. Serve moves a route without restarting a replica.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import ValidationError
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import RayError

from mqwen.release.client import Server
from mqwen.release.errors import ReleaseError

LOOPBACK = "127.0.0.1"
POLL = 0.5  # seconds
TIMEOUT = 30.0  # seconds in which the dashboard must say something
MODEL = "ModelReplica"  # of an application's deployments the one that scales; serve/app.py names it

Application = dict[str, Any]
"""As in the config file of `serve deploy`: name, route_prefix, import_path, args, runtime_env, ..."""


@dataclass(frozen=True)
class ServiceSettings:
    """`config` is a file as `serve deploy` takes it, with one application: how the model is to be served. The release
    gives it its `checkpoint`, a name, and while it is a candidate another route. `address` is the cluster's dashboard,
    `url` where its HTTP proxy answers, if not where `config` says. `start_limit` is in seconds.
    """

    config: Path
    address: str = "http://127.0.0.1:8265"
    url: str = ""
    start_limit: float = 600.0


class _Client(ServeSubmissionClient):
    """Ray's waits for an answer without an end."""

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        return super()._do_request(*args, timeout=TIMEOUT, **kwargs)


class Service:
    """One model's applications on a cluster. `key` is what clients send; it may be empty where `auth` is off.

    `check` is given a config as `serve deploy` reads it, and raises pydantic's ValidationError where Serve refuses it.
    """

    def __init__(self, settings: ServiceSettings, key: str, check: Callable[[dict[str, Any]], object]) -> None:
        """Raises ReleaseError for a config that is none, a missing key, or a dashboard that does not answer."""
        if not settings.start_limit >= 0:
            raise ReleaseError(f"--service.start-limit is {settings.start_limit}; 0 or more seconds are allowed")
        self._config, self._template = _read_config(settings.config, check)
        self._limit = settings.start_limit
        self._http = {"host": LOOPBACK} | (
            self._config.get("http_options") or {}
        )  # Serve's own default is every interface
        host = self._http["host"].replace("0.0.0.0", LOOPBACK)
        self._url = (settings.url or f"http://{host}:{self._http.get('port', 8000)}").rstrip("/")
        self.model: str = self._template["args"]["name"]
        self._route: str = self._template.get("route_prefix", "/")
        if self._template["args"].get("auth") != "off" and not key:
            raise ReleaseError("MQWEN_API_KEY is not set: the canary questions are asked with a client's API key")
        self._key = key
        self._address = settings.address
        with self._answers():
            self._client = _Client(settings.address)

    @property
    def live(self) -> Application | None:
        """The application at the route that clients use. Raises ReleaseError where that is not one of this model."""
        for name, details in self._details().items():
            if details["route_prefix"] == self._route:
                config = details["deployed_app_config"]
                if not config or config.get("args", {}).get("name") != self.model:
                    raise ReleaseError(
                        f"application {name!r} stands at {self._route} and does not serve {self.model!r} by a config; "
                        "end it, or give the config another route_prefix"
                    )
                return config
        return None

    @property
    def standby(self) -> Application | None:
        """This model's application that clients do not reach: the one before the live one."""
        found = [one for one in self._mine() if one["route_prefix"] != self._route]
        return found[0] if found else None

    def check_free(self, name: str, checkpoint: str) -> None:
        """Raises ReleaseError where this name or checkpoint is deployed already: neither must be written over."""
        for one in self._mine():
            if one["args"].get("checkpoint") == checkpoint:
                where = "live already" if one["route_prefix"] == self._route else "standing by: roll back to it"
                raise ReleaseError(f"{checkpoint} is {where} (application {one['name']!r})")
        if name in self._details():
            raise ReleaseError(
                f"another application {name!r} is deployed already, from another place; end it, or give the run "
                "another name"
            )

    @contextmanager
    def candidate(self, name: str, checkpoint: str) -> Iterator[Application]:
        """Starts an application beside the live one, in the place of the standby; ends it where the block fails.

        It starts with as many replicas as the live one has come to, whose load it may get at once. Raises ReleaseError
        where it does not get ready.
        """
        one = copy.deepcopy(self._template) | {"name": name, "route_prefix": f"/{name}"}
        live = self.live
        one["args"] |= {"checkpoint": checkpoint, "initial_replicas": self._replicas(one["args"], live)}
        one["runtime_env"] = _with_upload(one.get("runtime_env") or {})
        stay = [live] if live else []
        try:
            self._deploy([*stay, one], new=one)
            yield one
        except BaseException as error:
            try:
                self._put(stay)
            except ReleaseError as second:
                raise ReleaseError(
                    f"{str(error) or 'stopped'}; then application {name!r} could not be ended, and stands beside the "
                    f"live one until it is: {second}"
                ) from error
            raise

    def switch(self, to: Application) -> str:
        """Gives `to` the clients' route, and what stands there now the one that bears its name; says so.

        Raises ReleaseError, before anything is moved, where `to` is not running.
        """
        state = self._details()[to["name"]]
        if state["status"] != "RUNNING":
            raise ReleaseError(
                f"application {to['name']!r} is {state['status']}, so nothing is moved: {_reason(state)}"
            )
        live = self.live
        aside = [live | {"route_prefix": f"/{live['name']}"}] if live else []
        new = to | {"route_prefix": self._route}
        self._deploy([*aside, new], new=new)
        return f"live: {to['name']}" + (f"; standing by: {live['name']}" if live else "")

    def roll_back(self) -> str:
        """Switches to the standby. Raises ReleaseError where there is none, or it is not running."""
        if not (standby := self.standby):
            raise ReleaseError(f"no second application of {self.model!r} stands by, so there is nothing to go back to")
        return self.switch(standby)

    def server(self, application: Application) -> Server:
        """Where an application is asked."""
        return Server(self._url + application["route_prefix"].rstrip("/"), self._key, self.model)

    def _details(self) -> dict[str, Any]:
        with self._answers():
            return self._client.get_serve_details()["applications"]

    def _replicas(self, args: dict[str, Any], live: Application | None) -> int:
        """Of the live application, within what the new one may have."""
        deployments = self._details()[live["name"]]["deployments"] if live else {}
        running = len(deployments.get(MODEL, {}).get("replicas", [])) or 1
        least = int(args.get("min_replicas", 1))
        return max(least, min(running, int(args.get("max_replicas", least))))

    def _mine(self) -> list[Application]:
        configs = [details["deployed_app_config"] for details in self._details().values()]
        return [one for one in configs if one and one.get("args", {}).get("name") == self.model]

    def _put(self, mine: list[Application]) -> None:
        """Makes these the model's applications; those of other models stay as they are."""
        configs = [details["deployed_app_config"] for details in self._details().values()]
        others = [one for one in configs if one and one.get("args", {}).get("name") != self.model]
        with self._answers():
            self._client.deploy_applications(
                self._config | {"http_options": self._http, "applications": [*others, *mine]}
            )

    @contextmanager
    def _answers(self) -> Iterator[None]:
        try:
            yield
        # A connection's errors, a token that is none, an answer that is no success, or of something else than Ray.
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, RayError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ReleaseError(f"--service.address {self._address}: the Ray dashboard there says no: {said}") from error

    def _deploy(self, mine: list[Application], *, new: Application) -> None:
        """Waits until `new` of them runs and all have their routes; the others may be ill: that may be why it comes.

        Raises ReleaseError where it is not running in time.
        """
        self._put(mine)
        limit = time.monotonic() + self._limit
        while True:
            details = self._details()
            state = details.get(new["name"], {})
            moved = all(details.get(one["name"], {}).get("route_prefix") == one["route_prefix"] for one in mine)
            if state.get("status") == "RUNNING" and moved:
                return
            if state.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise ReleaseError(f"application {new['name']!r} does not start: {_reason(state)}")
            if time.monotonic() > limit:
                raise ReleaseError(
                    f"application {new['name']!r} is not running after {self._limit:.0f} s: {_reason(state)}"
                )
            time.sleep(POLL)


def _read_config(file: Path, check: Callable[[dict[str, Any]], object]) -> tuple[dict[str, Any], Application]:
    """The whole of it, and its one application."""
    try:
        config = yaml.safe_load(file.read_text())
        (application,) = config["applications"]
        if not application["args"]["name"]:
            raise KeyError("name")
        check({name: part for name, part in config.items() if part is not None})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ReleaseError(f"--service.config {file} cannot be read: {str(error).splitlines()[0]}") from error
    except ValidationError as error:
        (first, *_) = error.errors()
        where = ".".join(map(str, first["loc"]))
        raise ReleaseError(f"--service.config {file} is not what Serve takes: {where}: {first['msg']}") from error
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ReleaseError(
            f"--service.config {file} must hold one application with args.name, the model's name; see serve/config.yaml"
        ) from error
    return config, application


def _with_upload(runtime_env: dict[str, Any]) -> dict[str, Any]:
    """The code that a submitted job brought along, for replicas whose config names none: their nodes may lack it."""
    job = ray.get_runtime_context().runtime_env
    if "working_dir" in runtime_env or not job.get("working_dir"):
        return runtime_env
    path = {name: value for name, value in job.get("env_vars", {}).items() if name == "PYTHONPATH"}
    return runtime_env | {"working_dir": job["working_dir"], "env_vars": path | (runtime_env.get("env_vars") or {})}


def _reason(state: dict[str, Any]) -> str:
    """The last line that Serve says of what does not run."""
    said = [state.get("message", "")] + [one.get("message", "") for one in state.get("deployments", {}).values()]
    lines = [line.strip() for text in said for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "Serve gives no reason"
