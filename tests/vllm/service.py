"""Both engines behind one service: `serve run` with a model on each, asked the same by the official client.

    .cache/vllm/bin/python tests/vllm/service.py FOLDER    # after parity.py export FOLDER

Greedy texts, usage and the tokens of the log probabilities must be equal, streamed or not.
"""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import openai

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 16


def main(folder: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, which ends the server
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = {
        "checkpoint": str((folder / "artifact").resolve()),
        "name": "ours",
        "auth": "off",
        "cpus": 0.5,
        "more_models": {
            "vllm": {"checkpoint": str((folder / "model").resolve()), "engine": "vllm", "kv_cache_bytes": 1 << 28}
        },
    }
    application = {"name": "both", "import_path": "serve.app:build", "route_prefix": "/", "args": arguments}
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    place = Path(tempfile.mkdtemp(prefix="ray-"))
    (place / "config.yaml").write_text(json.dumps(config))
    variables = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(place), "RAY_USAGE_STATS_ENABLED": "0"}
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(place / "config.yaml")]
    with (place / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=log, stderr=log)
    try:
        wait_until_ready(server, port, place / "log")
        compare(f"http://127.0.0.1:{port}/v1", json.loads((folder / "requests.json").read_text()), folder)
    finally:
        server.terminate()
        server.wait(60)


def wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    limit = time.monotonic() + 400
    while True:
        assert server.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < limit, log.read_text()[-4000:]
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)


def compare(url: str, asked: list[dict[str, Any]], folder: Path) -> None:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        for number, request in enumerate(asked):
            options: dict[str, Any] = {"messages": messages(request, folder, number), "max_tokens": NEW_TOKENS}
            options |= {"temperature": 0, "logprobs": True}
            whole = [client.chat.completions.create(model=name, **options) for name in ("ours", "vllm")]
            streams = [client.chat.completions.create(model=name, **options, stream=True) for name in ("ours", "vllm")]
            texts = ["".join(one.choices[0].delta.content or "" for one in stream) for stream in streams]
            ours, other = (reply.choices[0] for reply in whole)
            assert texts == [ours.message.content] * 2, (number, texts, ours.message.content)
            assert other.message.content == ours.message.content, (number, other.message.content, ours.message.content)
            assert other.finish_reason == ours.finish_reason, number
            assert whole[0].usage == whole[1].usage, (number, whole[0].usage, whole[1].usage)
            tokens = [[one.token for one in choice.logprobs.content] for choice in (ours, other)]  # type: ignore[union-attr]
            assert tokens[0] == tokens[1], (number, tokens)
    print(f"{len(asked)} requests through the service: vLLM's greedy answers are ours, streamed and whole")


def messages(request: dict[str, Any], folder: Path, number: int) -> list[dict[str, Any]]:
    files = iter(sorted((folder / "requests").glob(f"{number}-*.png")))
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(next(files).read_bytes())}}
        if part["type"] == "image"
        else part
        for part in request["messages"][0]["content"]
    ]
    return [{"role": "user", "content": parts}]


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
