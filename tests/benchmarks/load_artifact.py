"""Loading a full-size artifact (Qwen-1.8B + CLIP-L, random weights, bf16): anonymous memory, and time.

python -m tests.benchmarks.load_artifact

Writes the artifact into a folder of its own, deleted at the end (4.3 GB), then loads it in processes of their own: with
`from_pretrained`, as it is and as float32, and for comparison with safetensors alone, which maps the files, and with a
read of them into memory. They take turns, after one round that fills the page cache. In the end each has summed all
weights, so that every page was there.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Event, Thread

from tests.memory import anonymous_bytes

ROUNDS = 3
WAYS = ("from_pretrained", "from_pretrained as float32", "safetensors, mapped", "safetensors, read")
QWEN_1_8B = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 11008}


def write(folder: Path) -> None:
    import torch

    from mqwen.model import MQWenConfig, MQWenLMHeadModel

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = MQWenLMHeadModel(MQWenConfig(**QWEN_1_8B))
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="2GB")


def load(folder: Path, how: str) -> None:
    """Prints seconds, the most anonymous bytes above those before, and the bytes of the weights."""
    import torch
    from safetensors.torch import load_file

    from mqwen.model import MQWenLMHeadModel

    before, most, done = anonymous_bytes(), [0], Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], anonymous_bytes())

    watcher = Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    if how.startswith("from_pretrained"):
        dtype = torch.float32 if how.endswith("float32") else torch.bfloat16
        tensors = list(MQWenLMHeadModel.from_pretrained(folder, dtype=dtype).parameters())
    else:
        mapped = [tensor for file in sorted(folder.glob("*.safetensors")) for tensor in load_file(file).values()]
        tensors = [tensor.clone() for tensor in mapped] if how.endswith("read") else mapped
    sum(tensor.sum() for tensor in tensors)  # all pages are there
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    print(seconds, max(most[0], anonymous_bytes()) - before, sum(t.numel() * t.element_size() for t in tensors))


def measure(folder: Path, how: str) -> tuple[float, int, int]:
    words = [sys.executable, "-m", "tests.benchmarks.load_artifact", str(folder), how]
    seconds, memory, needed = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), int(memory), int(needed)


def main() -> None:
    if len(sys.argv) > 1:
        return load(Path(sys.argv[1]), sys.argv[2])
    from tests.benchmarks.result import write_result

    found: dict[str, list[tuple[float, int, int]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        for number in range(ROUNDS + 1):
            for how, results in found.items():
                measured = measure(Path(name), how)
                results += [measured] if number else []  # the first round fills the page cache
    lines = ["| | seconds, median | each | anonymous memory at its peak | weights in this dtype | ratio |"]
    lines += ["|---|---|---|---|---|---|"]
    for how, results in found.items():
        memory, needed, each = max(result[1] for result in results), results[0][2], [result[0] for result in results]
        times = f"{statistics.median(each):.2f} | {', '.join(f'{seconds:.2f}' for seconds in each)}"
        lines.append(f"| {how} | {times} | {memory:,} | {needed:,} | {memory / needed:.3f} |")
    write_result("load-artifact", "\n".join(lines))


if __name__ == "__main__":
    main()
