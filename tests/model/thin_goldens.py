"""Make tests/model/fixtures from the reference's recordings: `python tests/model/thin_goldens.py REFERENCE_FOLDER`.

Inputs and small tensors are kept whole. Of large outputs a regular sample stays, so that the fixtures are small enough
to be checked in: values at `sample_places(numel, count)` under `<name>@<shape>`. Weights are kept exactly.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures"
INPUTS = (
    "input_ids",
    "labels",
    "attention_mask",
    "greedy_tokens",
    "images_fp16",
    "pixel_values",
    "images_raw",
)
PRIME = 1_000_003  # steps over a tensor so that every row and column region is met


def sample_places(numel: int, count: int) -> torch.Tensor:
    """`count` different places of a tensor of `numel` elements, the same everywhere."""
    return torch.arange(count) * PRIME % numel


def thin(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    field = name.split(".", 1)[1]
    if field in INPUTS or tensor.numel() <= 512 or ".adapter." in name:
        return name, tensor.clone()
    positions = tensor.shape[:-1].numel()
    count = 2 * positions if "logits" in field else 128
    shape = "x".join(map(str, tensor.shape))
    return f"{name}@{shape}", tensor.flatten()[sample_places(tensor.numel(), count)].clone()


def main(reference: Path) -> None:
    golden = load_file(reference / "golden.safetensors")
    golden["c8_trainer.images_raw"] = golden["c8_trainer.images_raw"].half()  # the reference rounds them so itself
    left_out = {"c2_image.pixel_values_raw", "c5a_long.layer0_past.0.key", "c5a_long.layer0_past.0.value"}
    thinned = dict(thin(name, tensor) for name, tensor in golden.items() if name not in left_out)
    save_file(thinned, FIXTURES / "golden.safetensors")

    recorded = json.loads((reference / "golden.json").read_text())["meta"]
    cases = {name: recorded[name] for name in ("c8_trainer", "c10_generation")}
    cases["c7_lora"] = {"settings": recorded["c7_lora"]["settings"]}
    (FIXTURES / "golden.json").write_text(json.dumps(cases, separators=(",", ":")) + "\n")

    qwen = load_file(reference / "tiny-qwen" / "model.safetensors")
    first = ("lm_head", ".h.0.", ".h.1.attn", ".h.1.ln")
    halves = [[n for n in sorted(qwen) if any(part in n for part in first) is wanted] for wanted in (True, False)]
    weight_map = {}
    for number, half in enumerate(halves, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        (FIXTURES / "tiny-qwen").mkdir(parents=True, exist_ok=True)
        save_file({n: qwen[n] for n in half}, FIXTURES / "tiny-qwen" / file)
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (FIXTURES / "tiny-qwen" / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")

    clip = load_file(reference / "tiny-clip" / "model.safetensors")
    kept = {n: t for n, t in clip.items() if n.startswith("vision_model.") or n == "text_projection.weight"}
    (FIXTURES / "tiny-clip").mkdir(parents=True, exist_ok=True)
    save_file(kept, FIXTURES / "tiny-clip" / "model.safetensors")
    save_file(load_file(reference / "feature_proj.safetensors"), FIXTURES / "feature_proj.safetensors")
    for file in ("tiny-qwen/config.json", "tiny-clip/config.json", "tiny-clip/preprocessor_config.json"):
        (FIXTURES / file).write_text((reference / file).read_text().rstrip() + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
