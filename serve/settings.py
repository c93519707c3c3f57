"""Options of `serve run serve.app:build`, checked before anything is deployed."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import click
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mqwen.storage import Location, StorageError, local_folder, readable
from serve.keys import KeysError, load_hashes


class SettingsError(click.ClickException, ValueError):
    """Wrong options or a wrong checkpoint. `serve run` prints a ClickException as one line and exits with 1."""


def _expanded(path: Path) -> Path:
    return path.expanduser().resolve()  # replicas may have another working directory


LocalPath = Annotated[Path, AfterValidator(_expanded)]


def _answering(uri: Any) -> Location:
    try:
        return readable(uri)
    except StorageError as error:
        raise ValueError(str(error)) from error


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    checkpoint: Annotated[Location, BeforeValidator(_answering)]  # URI of an artifact, as jobs/export.py writes it
    name: str = Field("", max_length=200)  # of the model, for clients; default: the folder's name
    auth: Literal["on", "off"] = "on"
    keys_file: LocalPath | None = None  # hashes of API keys, one a line, beside those in MQWEN_API_KEYS
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    initial_replicas: int | None = Field(None, ge=1)  # from which it scales; default: min_replicas
    max_ongoing_requests: int = Field(64, ge=1)  # at work in one replica; it scales up from half of this
    max_queued_requests: int = Field(256, ge=1)  # waiting for a replica; above it 429
    cpus: float = Field(1, ge=0)  # of one replica
    gpus: float = Field(0, ge=0)  # of one replica; 0 runs on the CPU
    max_body_bytes: int = Field(32 << 20, ge=1)
    max_pictures: int = Field(16, ge=0)  # of one request

    @model_validator(mode="after")
    def _check_range(self) -> "Settings":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}")
        if not self.min_replicas <= (self.initial_replicas or self.min_replicas) <= self.max_replicas:
            raise ValueError(f"initial_replicas={self.initial_replicas} is not within min_replicas and max_replicas")
        return self

    @property
    def model(self) -> str:
        """The name that clients give as "model"."""
        return self.name or self.checkpoint.name

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> "Settings":
        """From `option=value` words, the checkpoint checked. Raises SettingsError, in one line."""
        known = list(cls.model_fields)
        for name in arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(known)}."
                raise SettingsError(f"Unknown option {name}={arguments[name]}; {hint}")
        try:
            settings = cls.model_validate(arguments)
        except ValidationError as error:
            raise SettingsError("; ".join(_in_words(one) for one in error.errors())) from error
        _check_checkpoint(settings.checkpoint)
        return settings

    def key_hashes(self) -> frozenset[str] | None:
        """Hashes of the keys that may enter, None with auth=off. Raises SettingsError where there are none."""
        if self.auth == "off":
            return None
        try:
            return load_hashes(self.keys_file)
        except KeysError as error:
            raise SettingsError(str(error)) from error


def _in_words(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"Option {name} is required: serve run serve.app:build {name}=..."
    message = error["msg"].removeprefix("Value error, ")
    return f"Option {name}={error['input']}: {message}" if name else message


def _check_checkpoint(checkpoint: Location) -> None:
    """Raises SettingsError where a file is missing or damaged, before replicas try to load it again and again."""
    from mqwen.model.artifact import open_artifact

    try:
        open_artifact(local_folder(checkpoint))
    except (ValueError, OSError, StorageError) as error:
        raise SettingsError(f"checkpoint={checkpoint} cannot be served: {error}") from error
