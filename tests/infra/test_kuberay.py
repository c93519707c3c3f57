"""The manifests are what KubeRay 1.7 and Kubernetes take, with no field that they do not know."""

import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from infra.kuberay.make import HERE, JOBS, files
from mqwen.train.command_line import read_settings

SCHEMAS = json.loads(gzip.decompress((Path(__file__).parent / "kuberay-1.7.0.json.gz").read_bytes()))
MANIFESTS = {file.name: list(yaml.safe_load_all(file.read_text())) for file in sorted(HERE.glob("*.yaml"))}
OBJECTS = [(name, one) for name, found in MANIFESTS.items() for one in found]
RAYS = [(name, one) for name, one in OBJECTS if one["apiVersion"].startswith("ray.io/")]


def closed(schema: Any) -> Any:
    """No unknown field, where fields are listed."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(part) for name, part in schema.items()}
    free = found.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in found
    listed = isinstance(found.get("properties"), dict) and found.get("type") == "object"
    return found | ({"additionalProperties": False} if listed and not free else {})


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(manifest)
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


CHECKS = {kind: jsonschema.Draft4Validator(closed(schema)) for kind, schema in SCHEMAS.items()}


def check(manifest: dict[str, Any]) -> None:
    CHECKS[manifest["kind"]].validate(manifest)


def test_there_are_manifests_of_each_kind() -> None:
    assert {one["kind"] for _, one in RAYS} == set(SCHEMAS)


def test_the_made_files_are_the_current_ones() -> None:
    for name, text in files().items():
        assert (HERE / name).read_text() == text, "python -m infra.kuberay.make writes the new ones"


@pytest.mark.parametrize(("name", "manifest"), RAYS)
def test_kuberay_takes_it(name: str, manifest: dict[str, Any]) -> None:
    check(manifest)
    for place in (manifest["spec"], cluster_of(manifest), pods(manifest)[1]["spec"]["containers"][0]):
        place["unheardOf"] = 1
        with pytest.raises(jsonschema.ValidationError, match="unheardOf"):
            check(manifest)
        del place["unheardOf"]


@pytest.mark.parametrize(("name", "manifest"), [one for one in OBJECTS if one not in RAYS])
def test_kubernetes_takes_it(name: str, manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.33", strict=True)


def guard(template: dict[str, Any]) -> None:
    """As the namespace label pod-security.kubernetes.io/enforce: restricted wants it."""
    pod = {"apiVersion": "v1", "kind": "Pod"} | template | {"metadata": {"name": "pod"} | template.get("metadata", {})}
    kubernetes_validate.validate(pod, "1.33", strict=True)
    assert template["spec"]["securityContext"]["runAsNonRoot"]
    assert template["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in template["spec"]["containers"]:
        assert container["securityContext"] == GUARDED
        assert set(container["resources"]) == {"requests", "limits"}
        assert all("value" not in variable for variable in container.get("env", []))
        sources = [json.dumps(one) for one in container.get("envFrom", [])]
        assert len(set(sources)) == len(sources)


GUARDED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize(("name", "manifest"), RAYS)
def test_its_pods_are_guarded(name: str, manifest: dict[str, Any]) -> None:
    cluster = cluster_of(manifest)
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["autoscalerOptions"]["securityContext"] == GUARDED
    submitter = manifest["spec"].get("submitterPodTemplate")
    for template in [*pods(manifest), *([submitter] if submitter else [])]:
        guard(template)


def test_what_kuberay_asks_for_beside_its_schemas() -> None:
    """Read in its code: it makes no Service without a port of that name on the head, and says of a Job that submits
    who made it, but not of the Job's pods."""
    (service,) = (one for _, one in RAYS if one["kind"] == "RayService")
    served = yaml.safe_load(service["spec"]["serveConfigV2"])["http_options"]["port"]
    (head,) = pods(service)[0]["spec"]["containers"]
    assert {"name": "serve", "containerPort": served} in head["ports"]
    (policy,) = (one for _, one in OBJECTS if one["kind"] == "NetworkPolicy")
    made = {"podSelector": {"matchLabels": {"app.kubernetes.io/created-by": "kuberay-operator"}}}
    assert {"from": [made]} in policy["spec"]["ingress"]
    jobs = [one for _, one in RAYS if one["kind"] == "RayJob"]
    assert jobs
    for one in jobs:
        assert one["spec"]["submitterPodTemplate"]["metadata"]["labels"] == made["podSelector"]["matchLabels"]


@pytest.mark.parametrize("command", JOBS.values(), ids=JOBS)
def test_the_jobs_take_their_command_lines(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, job, *options = command.split()
    assert (HERE.parents[1] / job.removeprefix("/app/")).is_file()
    monkeypatch.setattr("sys.argv", [job, *options])
    assert read_settings(None).data.dataset.startswith("s3://BUCKET/")
