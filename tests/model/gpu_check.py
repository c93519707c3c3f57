"""The model on a CUDA device: `PYTHONPATH=platform:. python tests/model/gpu_check.py`. Needs one GPU, takes a minute.

Not collected by pytest: continuous integration has no GPU. Each line states what was computed, against what, and ends
in ok, or the script fails.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from mqwen.model import MQWenConfig, MQWenLMHeadModel
from tests.model.golden import difference, tiny_model, whole

DEVICE = torch.device("cuda")
# Heads of 64 channels, as flash kernels want them; the rest small.
CONFIG = MQWenConfig(
    vocab_size=32000,
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    kv_channels=64,
    intermediate_size=2816,
    seq_length=65536,
    image_token_id=31000,
    vision_config={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
)


def report(what: str, figure: float, limit: float) -> None:
    print(f"{what}: {figure:.3g} (at most {limit:.3g}) {'ok' if figure <= limit else 'TOO MUCH'}", flush=True)
    assert figure <= limit, what


@torch.no_grad()
def golden_cases() -> None:
    model = tiny_model().to(DEVICE)
    report("c1 float32, logits", difference("c1_text.logits", model(whole("c1_text.input_ids")).logits.cpu()), 5e-5)
    out = model(whole("c2_image.input_ids"), pixel_values=whole("c2_image.images_fp16"))
    report("c2 float32, logits", difference("c2_image.logits", out.logits.cpu()), 5e-5)
    mask = whole("c3_mask.attention_mask")
    out = model(whole("c3_mask.input_ids"), attention_mask=mask)
    report("c3 float32, logits, run by run", difference("c3_mask.logits", out.logits.cpu(), mask > 0), 5e-5)
    out = model(whole("c5a_long.input_ids"))
    report("c5a float32, logits", difference("c5a_long.logits", out.logits.cpu()), 2e-4)
    ids, pictures = whole("c4_decode_batch.input_ids"), whole("c4_decode_batch.pixel_values")
    tokens = model.generate(ids.to(DEVICE), pixel_values=pictures, max_new_tokens=8, do_sample=False)[:, 15:].cpu()
    report("c4 greedy tokens that differ", (tokens != whole("c4_decode_batch.greedy_tokens")).sum().item(), 0)
    half = tiny_model(dtype=torch.bfloat16).to(DEVICE)
    out = half(whole("c2_image.input_ids"), pixel_values=whole("c2_image.images_fp16"))
    report("c9 bfloat16, logits", difference("c9_bf16.logits", out.logits.cpu()), 0.1)


def packed(rows: int, length: int, run: int) -> dict[str, Any]:
    """Packed text on the host: ids, segments, labels at every third place."""
    ids = torch.randint(0, 31000, (rows, length), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(length) // run + 1).expand(rows, -1)
    return {"input_ids": ids, "segment_ids": segments, "labels": torch.where(ids % 3 == 0, ids, -100)}


def varlen_against_runs() -> None:
    """bfloat16 rows in one variable-length kernel against float32 run by run: loss and gradients."""
    torch.manual_seed(0)
    single = MQWenLMHeadModel(CONFIG).to(DEVICE).train()
    half = MQWenLMHeadModel(CONFIG).to(DEVICE, torch.bfloat16).train()
    half.load_state_dict(single.state_dict())
    rows = packed(2, 1000, 90)
    losses = []
    for model in (single, half):
        loss = model(**rows, logits_to_keep="labels").loss
        loss.backward()
        losses.append(loss.item())
    report("packed loss, bfloat16 varlen - float32", abs(losses[0] - losses[1]), 0.02)
    exact, rough = (m.transformer.h[0].attn.c_attn.weight.grad.float() for m in (single, half))
    report("its gradient at layer 0, relative", ((exact - rough).norm() / exact.norm()).item(), 0.05)


def memory_of_long_rows() -> None:
    """One row of 65,536 places: a mask alone would hold 4.3e9 elements. Peak above the weights, GB."""
    model = MQWenLMHeadModel(CONFIG).to(DEVICE, torch.bfloat16).train()
    for run in (65536, 700):
        rows = packed(1, 65536, run)
        if run == 65536:
            del rows["segment_ids"]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**rows, logits_to_keep="labels").loss.backward()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        model.zero_grad()
        report(f"peak of forward and backward, runs of {run}, GB", peak, 8.0)


def waits_and_speed() -> None:
    """With everything on the host, a training step's forward and backward never wait for the device."""
    model = MQWenLMHeadModel(CONFIG).to(DEVICE, torch.bfloat16).train()
    rows = packed(4, 4096, 300)
    model(**rows, logits_to_keep="labels").loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**rows, logits_to_keep="labels", num_items_in_batch=1000).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    print("no wait in forward and backward of a packed step: ok")
    for name, given in (("packed", rows), ("causal", {k: v for k, v in rows.items() if k != "segment_ids"})):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            model(**given, logits_to_keep="labels").loss.backward()
        torch.cuda.synchronize()
        print(f"{name}: {10 * 4 * 4096 / (time.perf_counter() - start):,.0f} positions/s forward and backward")


def compiled_blocks() -> None:
    """Blocks compiled by themselves: two graphs serve every packing."""
    model = MQWenLMHeadModel(CONFIG).to(DEVICE, torch.bfloat16).train()
    for block in model.transformer.h:
        block.compile(fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for run in (300, 410, 77, 1000):
        model(**packed(4, 4096, run), logits_to_keep="labels").loss.backward()
    report("graphs for four packings", torch._dynamo.utils.counters["stats"]["unique_graphs"], 2)
    rows = packed(4, 4096, 300)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        model(**rows, logits_to_keep="labels").loss.backward()
    torch.cuda.synchronize()
    print(f"packed, compiled: {10 * 4 * 4096 / (time.perf_counter() - start):,.0f} positions/s forward and backward")


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    print(torch.__version__, torch.cuda.get_device_name())
    golden_cases()
    varlen_against_runs()
    memory_of_long_rows()
    waits_and_speed()
    compiled_blocks()
