"""Training and serving on the cluster that `make cluster` starts, with something for each panel to show."""

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

from infra.cluster import ROOT
from infra.grafana.draw import Period
from infra.grafana.make import HERE
from mqwen.data.sources.digits import vocabulary_texts
from mqwen.model.vocabulary import VOCABULARY_FILE, train_vocabulary
from serve.keys import ENVIRONMENT, hash_key
from tests.end_to_end.commands import SMALL
from tests.end_to_end.nodes import free_port, wait
from tests.end_to_end.place import PICTURES, draw
from tests.engine.tiny import build_artifact
from tests.infra.operators import Up
from tests.serve.clients import Outcomes, ask, chat, closed_loop, connected
from tests.serve.running import KEY

MINUTES = 1.5  # of training steps
REPORTED = 20  # seconds after which Ray has reported and Prometheus has scraped
DASHBOARDS = [json.loads(file.read_text()) for file in sorted(HERE.glob("*.json"))]


def work(up: Up, folder: Path, s3: dict[str, str]) -> tuple[Period, str]:
    """The time it took, and all that the commands said. `s3` are the variables of a store with the bucket `bucket`."""
    began, said = time.time(), list[str]()

    def done(*words: object) -> None:
        command = list(map(str, [sys.executable, *words]))
        one = subprocess.run(command, cwd=ROOT, env=up.environment(**s3), capture_output=True, text=True, timeout=500)
        said.append(one.stdout + one.stderr)
        assert one.returncode == 0, said[-1]

    train_vocabulary(vocabulary_texts(), 400, folder / VOCABULARY_FILE)
    draw(folder, PICTURES)
    for name in ("data", "heldout"):
        words = ["--conversations", folder / "conversations.json", "--pictures", folder / "pictures"]
        done("jobs/ingest.py", "llava", *words, "--dataset", f"s3://bucket/{name}", "--tokenizer", folder)
    with serving(up, folder) as url, asking(url):
        words = ["--data.dataset", "s3://bucket/data", "--runs", "s3://bucket/runs", "--tokenizer", folder]
        words += ["--name", "operated", "--steps", "None", "--minutes", MINUTES, "--checkpoint.every", 20]
        words += ["--evaluation.dataset", "s3://bucket/heldout", "--evaluation.every", 20, "--parallel.workers", 1]
        done("jobs/pretrain.py", *SMALL, *words)
        time.sleep(REPORTED)
    return Period(began, time.time()), "".join(said)


@contextmanager
def serving(up: Up, folder: Path) -> Iterator[str]:
    """The URL of a model, deployed with README's command."""
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    (application,), port = config["applications"], free_port()
    config["http_options"]["port"] = port
    application["args"] |= {"name": "tiny", "checkpoint": str(build_artifact(folder / "tiny")), "cpus": 0.5}
    application["runtime_env"]["env_vars"] = {ENVIRONMENT: hash_key(KEY)}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    serve = [Path(sys.executable).with_name("serve"), "deploy", folder / "serve.yaml", "--address", up.dashboard]
    subprocess.run(list(map(str, serve)), cwd=ROOT, env=up.environment(), check=True)
    url = f"http://127.0.0.1:{port}"
    wait(lambda: httpx.get(f"{url}/ready").is_success, 180)
    yield url


@contextmanager
def asking(url: str) -> Iterator[None]:
    """One client who asks again and again, one who shows known pictures after new words, and one who errs."""
    program = [sys.executable, "-m", "tests.infra.working", url]
    clients = subprocess.Popen(program, cwd=ROOT)
    try:
        yield
        assert clients.poll() is None
    finally:
        clients.kill()
        clients.wait()


async def ask_for_ever(url: str) -> None:
    async def err() -> None:
        while True:
            await ask(client, chat(0) | {"model": "other"}, Outcomes())
            await asyncio.sleep(1)

    async def show_again() -> None:
        """The prefix cache does not know such a prompt; that of pictures knows the picture."""
        for number in itertools.count():
            body = chat(number)
            body["messages"][0]["content"].reverse()
            await ask(client, body, Outcomes())
            await asyncio.sleep(1)

    async with connected(url) as client:
        await asyncio.gather(closed_loop(client, 1, asyncio.Event()), show_again(), err())


if __name__ == "__main__":
    asyncio.run(ask_for_ever(sys.argv[1]))
