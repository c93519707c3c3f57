"""Loading a full-size artifact (Qwen-1.8B + CLIP-L, random weights, bf16): anonymous memory, and time.

python tests/benchmarks/load_artifact.py FOLDER

Writes the artifact into FOLDER where it is missing (4.3 GB), then loads it in processes of their own: with
`from_pretrained`, and for comparison with a plain safetensors read of the same files into memory. The two take turns,
after one round that fills the page cache.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

ROUNDS = 5
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


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


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
    if how == "from_pretrained":
        tensors = list(MQWenLMHeadModel.from_pretrained(folder, dtype=torch.bfloat16).parameters())
    else:
        # clone: load_file maps the file, and weights that are to be used must be read.
        tensors = [t.clone() for file in sorted(folder.glob("*.safetensors")) for t in load_file(file).values()]
    sum(tensor.sum() for tensor in tensors)  # all pages are there
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    print(seconds, max(most[0], anonymous_bytes()) - before, sum(t.numel() * t.element_size() for t in tensors))


def main() -> None:
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        return load(folder, sys.argv[2])
    if not (folder / "config.json").exists():
        write(folder)
    found: dict[str, list[tuple[float, int, int]]] = {"from_pretrained": [], "safetensors": []}
    for number in range(ROUNDS + 1):
        for how, results in found.items():
            words = [sys.executable, __file__, str(folder), how]
            output = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
            if number:
                results.append((float(output[0]), int(output[1]), int(output[2])))
    print("| | seconds, median of 5 | anonymous memory at its peak, bytes | of what the weights need |")
    print("|---|---|---|---|")
    for how, results in found.items():
        memory = max(result[1] for result in results)
        seconds = statistics.median(result[0] for result in results)
        print(f"| {how} | {seconds:.2f} | {memory:,} | {memory / results[0][2]:.3f} |")


if __name__ == "__main__":
    main()
