"""RayJobs and the RayService of cluster.yaml's own pods: `python -m infra.kuberay.make` writes the files beside it.

What a job or a service needs of its cluster stands once, in cluster.yaml; these files add what it runs.
"""

import json
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
PLACES = "--runs s3://BUCKET/runs --parallel.workers 2"
JOBS = {
    "pretrain": f"python /app/jobs/pretrain.py --recipe align --name align --model.init-from s3://BUCKET/qwen-clip "
    f"--data.dataset s3://BUCKET/data {PLACES}",
    "finetune": f"python /app/jobs/finetune.py --recipe sft-full --name tuned --model.init-from s3://BUCKET/artifact "
    f"--data.dataset s3://BUCKET/conversations {PLACES}",
}
HEAD = "# Made from cluster.yaml by `python -m infra.kuberay.make`.\n"


def cluster() -> dict[str, Any]:
    """cluster.yaml's, with no part that two groups share."""
    return json.loads(json.dumps(yaml.safe_load((HERE / "cluster.yaml").read_text())["spec"]))


def job(name: str, entrypoint: str) -> dict[str, Any]:
    """A run goes on from its last checkpoint when it is started again, so one that failed is. Its driver has a place on
    a worker, which outlives the head."""
    pods = cluster()
    spec = {"entrypoint": entrypoint, "entrypointNumCpus": 1, "submissionMode": "K8sJobMode", "backoffLimit": 3}
    spec |= {"submitterPodTemplate": submitter(pods["headGroupSpec"]["template"]["spec"])}
    spec |= {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": 600, "rayClusterSpec": pods}
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": f"mqwen-{name}"}, "spec": spec}


def submitter(head: dict[str, Any]) -> dict[str, Any]:
    """The pod that submits the job and follows it, as guarded as the head. KubeRay gives it command and token, but not
    the label by which network.yaml lets it in: that one only its Job has."""
    (container,) = head["containers"]
    own = {"name": "submitter", "image": container["image"], "securityContext": container["securityContext"]}
    own |= {"resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}}}
    account = {"serviceAccountName": head["serviceAccountName"], "automountServiceAccountToken": False}
    pod = account | {"securityContext": head["securityContext"], "restartPolicy": "Never", "containers": [own]}
    return {"metadata": {"labels": {"app.kubernetes.io/created-by": "kuberay-operator"}}, "spec": pod}


def service() -> dict[str, Any]:
    """Serving: a new version takes over step by step. Serve's own probes are KubeRay's; /ready is the gateway's."""
    application = yaml.safe_load((HERE.parents[1] / "serve" / "config.yaml").read_text())["applications"][0]
    application["args"] |= {"checkpoint": "s3://BUCKET/artifact", "max_replicas": 8, "gpus": 1}
    del application["runtime_env"]  # the pods have MQWEN_API_KEYS from their secret
    config = {"http_options": {"host": "0.0.0.0", "port": 8000}, "applications": [application]}
    pods = cluster()
    groups = [pods["headGroupSpec"], *pods["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        container["envFrom"] += [{"secretRef": {"name": "mqwen-api-keys"}}]
    (head,) = pods["headGroupSpec"]["template"]["spec"]["containers"]
    head["ports"] += [
        {"name": "serve", "containerPort": config["http_options"]["port"]}
    ]  # KubeRay makes a Service of it
    options = {"gatewayClassName": "istio", "stepSizePercent": 10, "intervalSeconds": 30, "maxSurgePercent": 50}
    upgrade = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": options}
    spec = {"upgradeStrategy": upgrade, "excludeHeadPodFromServeSvc": True}
    spec |= {"serveConfigV2": yaml.safe_dump(config, sort_keys=False), "rayClusterConfig": pods}
    return {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "mqwen"}, "spec": spec}


class Plain(yaml.SafeDumper):
    """No anchors: each file can be read alone. A text of several lines stands as it is."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


Plain.add_representer(str, Plain.represent_str)


def files() -> dict[str, str]:
    made = {f"job-{name}.yaml": job(name, entrypoint) for name, entrypoint in JOBS.items()} | {
        "service.yaml": service()
    }
    return {name: HEAD + yaml.dump(one, Dumper=Plain, sort_keys=False, width=120) for name, one in made.items()}


if __name__ == "__main__":
    for name, text in files().items():
        (HERE / name).write_text(text)
