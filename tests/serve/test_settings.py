"""Options and checkpoints are refused in one line, before anything is deployed."""

import asyncio
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from mqwen.storage import Location
from serve.app import build
from serve.keys import ENVIRONMENT, hash_key
from serve.page import build as build_page
from serve.replica import ModelReplica
from serve.settings import Settings, SettingsError


def test_defaults(artifact: Path) -> None:
    settings = Settings.from_arguments({"checkpoint": str(artifact)})
    assert settings.checkpoint.path == str(artifact)
    assert settings.model == "tiny"
    assert settings.auth == "on"
    assert Settings.from_arguments({"checkpoint": str(artifact), "name": "other"}).model == "other"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chekpoint": "x"}, "Unknown option chekpoint=x; did you mean checkpoint?"),
        ({"replicas": "3"}, "did you mean min_replicas?|did you mean max_replicas?"),
        ({"zzz": "3"}, "Unknown option zzz=3; allowed are checkpoint, name, adapters"),
        ({"max_replicas": "many"}, "Option max_replicas=many: .*integer"),
        ({"min_replicas": "3", "max_replicas": "2"}, "max_replicas=2 is below min_replicas=3"),
        ({"initial_replicas": "2"}, "initial_replicas=2 is not within min_replicas and max_replicas"),
        ({"float8": "true", "engine": "vllm"}, "float8=true is for engine=mqwen: leave one of the two out"),
        ({"auth": "no"}, "Option auth=no: .*'on' or 'off'"),
        ({"cpus": "-1"}, "Option cpus=-1: .*greater than or equal to 0"),
        ({"checkpoint": "/nowhere"}, "checkpoint=/nowhere cannot be served: .*is no folder"),
    ],
)
def test_wrong_options(artifact: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as raised:
        Settings.from_arguments({"checkpoint": str(artifact)} | options)
    assert "\n" not in str(raised.value)


def test_the_checkpoint_is_required() -> None:
    with pytest.raises(SettingsError, match="Option checkpoint is required"):
        Settings.from_arguments({})


def test_an_artifact_on_s3(artifact: Path, bucket: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for file in artifact.iterdir():
        (bucket / "mine" / file.name).upload(file)
    settings = Settings.from_arguments({"checkpoint": f"{bucket}/mine"})
    assert settings.model == "mine"
    replica = ModelReplica(pickle.loads(pickle.dumps(settings.models()[0])))  # noqa: S301
    assert asyncio.run(replica.is_ready())
    asyncio.run(replica.engine.drain())
    for uri, message in (("s3://nowhere/mine", "has no bucket 'nowhere'"), (f"{bucket}/other", "holds no files")):
        with pytest.raises(SettingsError, match=f"checkpoint={uri}.*: .*{message}"):
            Settings.from_arguments({"checkpoint": uri})


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "qwen.tiktoken", "preprocessor_config.json", "generation_config.json"]
)
def test_a_missing_or_truncated_file_is_named(
    artifact: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(artifact, tmp_path / "tiny")
    damage(folder / name)
    with pytest.raises(SettingsError, match=rf"checkpoint=\S+ cannot be served: .*{name}"):
        Settings.from_arguments({"checkpoint": str(folder)})


def test_without_keys_nothing_is_built(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(SettingsError, match=r"no API keys are configured.*auth=off"):
        build({"checkpoint": str(artifact)})
    build({"checkpoint": str(artifact), "auth": "off"})


def test_keys_come_from_the_file(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    file = tmp_path / "keys"
    file.write_text(hash_key("sk-a"))
    settings = Settings.from_arguments({"checkpoint": str(artifact), "keys_file": str(file)})
    assert settings.key_hashes() == {hash_key("sk-a")}


def test_the_command_line_says_it_in_one_line() -> None:
    command = [str(Path(sys.executable).with_name("serve")), "run", "serve.app:build", "chekpoint=x"]
    run: Any = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1] == "Error: Unknown option chekpoint=x; did you mean checkpoint?"
    assert "Traceback" not in run.stderr


def test_another_models_vocabulary_is_refused(artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact, tmp_path / "artifact")
    lines = (folder / "qwen.tiktoken").read_bytes().splitlines(keepends=True)
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines[:-20]))
    with pytest.raises(SettingsError, match=r"cannot be served: image_token_id is \d+ in the model and \d+ in the"):
        Settings.from_arguments({"checkpoint": str(folder), "auth": "off"})


SAMPLES = Path(__file__).parents[2] / "serve"


def test_the_sample_of_several_models_can_be_built(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, hash_key("sk-a"))
    text = re.sub(r"s3://\S+", str(artifact), (SAMPLES / "several.yaml").read_text())
    models, page = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    models.args["more_models"].pop("vllm")  # it wants an export of another form
    settings = Settings.from_arguments(models.args)
    assert [one.model for one in settings.models()] == ["mine", "small"]
    assert [(one.gpus, one.max_replicas, list(one.adapters)) for one in settings.models()] == [
        (1, 4, ["poems"]),
        (0.5, 2, []),
    ]
    build(models.args)
    build_page(page.args)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"other": {}}, "more_models.other has no checkpoint"),
        ({"other": {"checkpoint": "X", "gpu": 1}}, "Unknown option gpu=1; did you mean gpus?"),
        ({"other": {"checkpoint": "X", "gpus": -1}}, "Option gpus=-1: "),
        ({"tiny": {"checkpoint": "X"}}, "given twice: tiny"),
        ({"other": {"checkpoint": "X", "adapters": {"tiny": "X"}}}, "given twice: tiny"),
        ({"other": {"checkpoint": "X", "engine": "vllm"}}, "engine=vllm serves an export of --form llava"),
    ],
)
def test_wrong_further_models(artifact: Path, models: dict[str, Any], message: str) -> None:
    given = yaml.safe_load(str(models).replace("'X'", repr(str(artifact))))
    with pytest.raises(SettingsError, match=re.escape(message)):
        Settings.from_arguments({"checkpoint": str(artifact), "more_models": given})


def test_the_sample_config_has_options_that_exist_with_their_defaults() -> None:
    text = (SAMPLES / "config.yaml").read_text()
    ServeDeploySchema.model_validate(yaml.safe_load(text))
    with_optional = re.sub(r"^( +)# (\w+: )", r"\1\2", text, flags=re.MULTILINE)
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(with_optional)).applications
    assert (application.name, application.import_path, application.route_prefix) == ("mine", "serve.app:build", "/")
    assert application.args.keys() <= Settings.model_fields.keys()
    assert len(application.args) > 4
    for option in (
        "min_replicas",
        "max_replicas",
        "cpus",
        "gpus",
        "max_queued_requests",
        "downscale_delay",
        "max_surge_percent",
    ):
        assert application.args[option] == Settings.model_fields[option].default
