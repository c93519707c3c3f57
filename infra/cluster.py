"""A cluster on this machine as operators run one: `make cluster` starts it, `make cluster-down` ends it.

A head and a worker node that ask for a token, and Prometheus that scrapes both and evaluates the alerts; all on
loopback. Where Grafana is installed it shows the dashboards of infra/grafana and Ray's own. What it is lies in
out/cluster: the token, the processes, their logs.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"
RAY = Path(sys.executable).with_name("ray")
PROMETHEUS = ROOT / ".cache" / "debian" / "usr" / "bin" / "prometheus"
GRAFANA = "grafana", "server", "--homepath", "/usr/share/grafana"  # as its packages install it
STARTED = 120.0  # seconds that a part may take to answer
GRACE = 15.0  # seconds that a part may take to end


def up(folder: Path) -> None:
    """Exits with one line where a cluster of this folder runs, or a part does not start; then nothing is left."""
    if folder.exists():
        sys.exit(f"error: {folder} is there: a cluster runs, or was cut off; make cluster-down ends it")
    folder.mkdir(parents=True)
    ray_folder = Path(tempfile.mkdtemp(prefix="mqwen-"))  # short: Ray's sockets lie in it
    (folder / "processes.json").write_text(json.dumps({"ray_folder": str(ray_folder), "processes": []}))
    token = secrets.token_hex(32)
    secret = os.open(folder / "token", os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(secret, token.encode())
    os.close(secret)
    gcs, dashboard, client = free_port(6379), free_port(8265), free_port(10001)
    prometheus, grafana = free_port(9090), free_port(3000)
    agents = [free_port(52365), free_port(0)]  # of two nodes on one machine
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_TMPDIR": str(ray_folder)}
    environment |= {"RAY_PROMETHEUS_HOST": f"http://{HOST}:{prometheus}"}
    environment |= {"RAY_GRAFANA_HOST": f"http://{HOST}:{grafana}"}
    # Jobs are run with the nodes' python; what is deployed is imported from here, as from an image's /app.
    environment |= {"PATH": f"{RAY.parent}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    common = [f"--node-ip-address={HOST}", "--disable-usage-stats", "--block"]
    head = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agents[0]}"]
    head += [f"--ray-client-server-port={client}"]
    worker = [f"--address={HOST}:{gcs}", f"--dashboard-agent-listen-port={agents[1]}"]
    asking = {"Authorization": f"Bearer {token}"}
    try:
        start(folder, "head", [str(RAY), "start", "--head", *head, *common], environment)
        wait(f"http://{HOST}:{dashboard}/api/version", asking, folder / "head.log")
        start(folder, "worker", [str(RAY), "start", *worker, *common], environment)
        wait(f"http://{HOST}:{agents[1]}/api/local_raylet_healthz", asking, folder / "worker.log")
        config = folder / "prometheus.yaml"
        config.write_text(json.dumps(scraping(ray_folder)))
        words = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'prometheus'}"]
        words += [f"--web.listen-address={HOST}:{prometheus}", "--log.level=warn"]
        start(folder, "prometheus", [str(PROMETHEUS), *words], environment)
        wait(f"http://{HOST}:{prometheus}/-/ready", {}, folder / "prometheus.log")
        if shutil.which(GRAFANA[0]):
            own = provision(folder / "grafana", ray_folder, f"http://{HOST}:{prometheus}", grafana)
            start(folder, "grafana", list(GRAFANA), environment | own | {"GF_SECURITY_ADMIN_PASSWORD": token})
            wait(f"http://{HOST}:{grafana}/api/health", {}, folder / "grafana.log")
    except BaseException:
        down(folder, keep_logs=True)
        raise
    print(f"export RAY_ADDRESS={HOST}:{gcs} RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(cat {folder / 'token'})")
    print(f"# dashboard and jobs: http://{HOST}:{dashboard}    Prometheus: http://{HOST}:{prometheus}")
    print(f"# Ray's client: ray://{HOST}:{client}")
    if shutil.which(GRAFANA[0]):
        print(f"# Grafana: http://{HOST}:{grafana}    user admin, the token is its password")
    print("# `make cluster-down` ends all of it")


def scraping(ray_folder: Path) -> dict[str, Any]:
    """Prometheus' configuration. JSON is YAML."""
    found = str(ray_folder / "ray" / "prom_metrics_service_discovery.json")
    job = {"job_name": "ray", "file_sd_configs": [{"files": [found], "refresh_interval": "5s"}]}
    return {
        "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
        "rule_files": [str(ROOT / "infra" / "prometheus" / "alerts.yaml")],
        "scrape_configs": [job],
    }


def provision(folder: Path, ray_folder: Path, prometheus: str, port: int) -> dict[str, str]:
    """Writes what Grafana reads when it starts; returns the environment that leads it there."""
    source = {"name": "Prometheus", "type": "prometheus", "url": prometheus, "access": "proxy", "isDefault": True}
    rays = ray_folder / "ray" / "session_latest" / "metrics" / "grafana" / "dashboards"
    shown = [
        {"name": name, "folder": name, "type": "file", "options": {"path": str(path)}}
        for name, path in (("MQWen", ROOT / "infra" / "grafana"), ("Ray", rays))
    ]
    for name, content in (("datasources", {"datasources": [source]}), ("dashboards", {"providers": shown})):
        (folder / "provisioning" / name).mkdir(parents=True)
        (folder / "provisioning" / name / "mqwen.yaml").write_text(json.dumps({"apiVersion": 1} | content))
    return {
        "GF_PATHS_PROVISIONING": str(folder / "provisioning"),
        "GF_PATHS_DATA": str(folder / "data"),
        "GF_PATHS_LOGS": str(folder / "logs"),
        "GF_SERVER_HTTP_ADDR": HOST,
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
    }


def start(folder: Path, name: str, command: list[str], environment: dict[str, str]) -> None:
    """In a session of its own, so that it outlives this command; its log is NAME.log."""
    with (folder / f"{name}.log").open("w") as log:
        one = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    state = json.loads((folder / "processes.json").read_text())
    state["processes"].append([one.pid, psutil.Process(one.pid).create_time()])
    (folder / "processes.json").write_text(json.dumps(state))


def wait(url: str, headers: dict[str, str], log: Path) -> None:
    limit = time.monotonic() + STARTED
    while time.monotonic() < limit:
        with suppress(httpx.TransportError):
            if httpx.get(url, headers=headers).is_success:
                return
        time.sleep(0.2)
    sys.exit(f"error: {url} does not answer; its log is {log}")


def down(folder: Path, keep_logs: bool = False) -> None:
    """Ends what `up` started, and forgets it."""
    if not (folder / "processes.json").exists():
        return
    state = json.loads((folder / "processes.json").read_text())
    for pid, created in reversed(state["processes"]):
        with suppress(psutil.NoSuchProcess):
            leader = psutil.Process(pid)
            if leader.create_time() != created:
                continue  # its number is another's now
            family = [leader, *leader.children(recursive=True)]
            leader.terminate()
            for process in psutil.wait_procs(family, timeout=GRACE)[1]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
    shutil.rmtree(state["ray_folder"], ignore_errors=True)
    (folder / "processes.json").unlink()
    if not keep_logs:
        shutil.rmtree(folder)


def free_port(wanted: int) -> int:
    """The wanted one, or any where it is taken."""
    with socket.socket() as probe:
        try:
            probe.bind((HOST, wanted))
        except OSError:
            probe.bind((HOST, 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    {"up": up, "down": down}[sys.argv[1]](Path(sys.argv[2]).absolute())
