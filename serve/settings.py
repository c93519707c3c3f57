"""Options of `serve run serve.app:build`, checked before anything is deployed."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import click
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    ValidationError,
    model_validator,
)

from mqwen.storage import Location, StorageError, local_folder, readable
from serve.keys import KeysError, load_hashes


class SettingsError(click.ClickException, ValueError):
    """Wrong options or a wrong checkpoint. `serve run` prints a ClickException as one line and exits with 1."""


def _expanded(path: Path) -> Path:
    return path.expanduser().resolve()  # replicas may have another working directory


LocalPath = Annotated[Path, AfterValidator(_expanded)]


def _answering(uri: Any) -> Location:
    if isinstance(uri, Location):
        return uri
    try:
        return readable(uri)
    except StorageError as error:
        raise ValueError(str(error)) from error


URI = Annotated[Location, BeforeValidator(_answering)]


class ModelSettings(BaseModel):
    """Of one model."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    checkpoint: URI  # URI of an artifact, as jobs/export.py writes it
    name: str = Field("", max_length=200)  # of the model, for clients; default: the folder's name
    adapters: dict[
        str, Annotated[Location, BeforeValidator(_answering)]
    ] = {}  # LoRA folders, by the names that clients give
    engine: Literal["mqwen", "vllm"] = "mqwen"  # vllm wants an export of --form llava, and mqwen[vllm]
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    initial_replicas: int | None = Field(None, ge=1)  # from which it scales; default: min_replicas
    max_ongoing_requests: int = Field(64, ge=1)  # at work in one replica; it scales up from half of this
    max_queued_requests: int = Field(256, ge=1)  # waiting for a replica, in each ingress; above it 429
    target_kv_usage: float = Field(0.7, gt=0, le=1)  # of a replica's KV cache; above it another replica is started
    upscale_delay: float = Field(10, ge=0)  # seconds that more replicas must have been wanted
    downscale_delay: float = Field(300, ge=0)
    max_surge_percent: int = Field(0, ge=0, le=100)  # more replicas that an upgrade may start before it stops old ones
    routing: Literal["affinity", "random"] = "affinity"  # a conversation's turns to one replica, or to any
    cpus: float = Field(1, ge=0)  # of one replica
    gpus: float = Field(0, ge=0)  # of one replica: 0 runs on the CPU, 0.5 shares a GPU and its memory
    kv_cache_bytes: int | None = Field(None, ge=1)  # default: what the engine finds right for its share of the device
    float8: bool = False  # the blocks' weights in 8 bits: faster, and half as large; answers change a little
    max_pixels: int = Field(64_000_000, ge=1)  # of one picture, known before it is decoded
    max_answer: int | None = Field(None, ge=1)  # most tokens that a request may ask for, and gets if it asks for none

    @model_validator(mode="after")
    def _check_range(self) -> "ModelSettings":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}")
        if not self.min_replicas <= (self.initial_replicas or self.min_replicas) <= self.max_replicas:
            raise ValueError(f"initial_replicas={self.initial_replicas} is not within min_replicas and max_replicas")
        if self.float8 and self.engine == "vllm":
            raise ValueError("float8=true is for engine=mqwen: leave one of the two out")
        return self

    @property
    def model(self) -> str:
        """The name that clients give as "model"."""
        return self.name or self.checkpoint.name


class Settings(ModelSettings):
    """Of a whole application: its first model, and what holds for all."""

    more_models: dict[str, dict[str, Any]] = {}  # by name, with their options; what lacks there is the first model's
    auth: Literal["on", "off"] = "on"
    keys_file: LocalPath | None = None  # hashes of API keys, one a line, beside those in MQWEN_API_KEYS
    key_requests_per_minute: int | None = Field(None, ge=1)  # of one API key, over all ingress replicas; above it 429
    key_concurrency: int | None = Field(None, ge=1)  # requests of one API key at once; above it 429
    ingress_replicas: int = Field(1, ge=1)
    max_body_bytes: int = Field(32 << 20, ge=1)
    max_pictures: int = Field(16, ge=0)  # of one request
    max_picture_bytes: int = Field(20 << 20, ge=1)  # of one picture that is fetched
    picture_hosts: tuple[str, ...] = ()  # https hosts that pictures may be fetched from: HOST or HOST:PORT
    picture_networks: tuple[IPvAnyNetwork, ...] = ()  # private networks (as 10.0.0.0/8) that those hosts may lie in
    max_seconds: float = Field(600, gt=0)  # of one request, its wait in the queue included; replicas drain as long

    def models(self) -> list[ModelSettings]:
        """All models of the application, the first one first. Raises SettingsError."""
        own = {name: getattr(self, name) for name in ModelSettings.model_fields}
        every = [ModelSettings.model_validate(own | {"name": self.model})]
        for name, options in self.more_models.items():
            _check_names(options, list(ModelSettings.model_fields))
            if "checkpoint" not in options:
                raise SettingsError(f"more_models.{name} has no checkpoint")
            with _in_one_line():
                every.append(ModelSettings.model_validate(own | {"adapters": {}, "name": name} | options))
        names = [name for one in every for name in (one.model, *one.adapters)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise SettingsError(f"models and adapters need names of their own; given twice: {', '.join(sorted(twice))}")
        return every

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> "Settings":
        """From `option=value` words, the checkpoint checked. Raises SettingsError, in one line."""
        _check_names(arguments, list(cls.model_fields))
        with _in_one_line():
            settings = cls.model_validate(arguments)
        for one in settings.models():
            _check_checkpoint(one)
        return settings

    def key_hashes(self) -> frozenset[str] | None:
        """Hashes of the keys that may enter, None with auth=off. Raises SettingsError where there are none."""
        if self.auth == "off":
            return None
        try:
            return load_hashes(self.keys_file)
        except KeysError as error:
            raise SettingsError(str(error)) from error


def _check_names(options: dict[str, Any], known: list[str]) -> None:
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(known)}."
            raise SettingsError(f"Unknown option {name}={options[name]}; {hint}")


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise SettingsError("; ".join(_in_words(one) for one in error.errors())) from error


def _in_words(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"Option {name} is required: serve run serve.app:build {name}=..."
    message = error["msg"].removeprefix("Value error, ")
    return f"Option {name}={error['input']}: {message}" if name else message


def _check_checkpoint(model: ModelSettings) -> None:
    """Raises SettingsError where a file is missing or damaged, before replicas try to load it again and again."""
    from mqwen.model.artifact import open_artifact

    try:
        folder = local_folder(model.checkpoint)
        if model.engine == "mqwen":
            open_artifact(folder)
        elif not (folder / "processor_config.json").is_file():
            raise ValueError("engine=vllm serves an export of --form llava, and this is none")
    except (ValueError, OSError, StorageError) as error:
        raise SettingsError(f"checkpoint={model.checkpoint} cannot be served: {error}") from error
