"""The engine with its blocks in 8 bits beside bfloat16, on one H200: `python -m tests.benchmarks.serve_float8`, with
Qwen-1.8B at 1, 16, 64 and 256 requests at once and Qwen-7B at 1 and 64, random weights.

For each model: tokens/s as serve_h200.py measures its text, 320 tokens in and 256 out; the bytes of the model; and what
8 bits change: how often the likeliest token is the same after the same text, how far greedy answers go before they
part, and the perplexity of text that the model in bfloat16 wrote itself, at temperature 1. `--artifact` says the latter
of an artifact, on any device. Writes a dated Markdown file, and the same as JSON, into `--out` after each model.
`--tiny` shows on a CPU that all of it runs.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mqwen.engine.engine import Engine, EngineSettings
from mqwen.engine.request import Request, TokenEvent
from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor, MQWenTokenizer
from mqwen.train.recipes import QWEN_7B
from tests.benchmarks.h200.measure import attempt, ceilings, machine
from tests.benchmarks.serve_h200 import RESULTS, run_case

KINDS = {"bfloat16": False, "float8": True}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 32,
    "intermediate_size": 128,
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
}
WRITERS, PROMPT = 16, 16  # requests whose answers are compared, and tokens of their prompts


def built(config: MQWenConfig, device: torch.device) -> MQWenLMHeadModel:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            return MQWenLMHeadModel(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def size_of(model: MQWenLMHeadModel) -> int:
    """Bytes that a step of the language model reads, embeddings left out."""
    parts = [*model.transformer.h.parameters(), *model.lm_head.parameters()]
    return sum(part.numel() * part.element_size() for part in parts)


def answers(engine: Engine, config: MQWenConfig, tokens: int, temperature: float) -> list[list[int]]:
    """Prompts with what follows them."""
    draw = random.Random(0)
    most = min(config.vocab_size, 150_000)
    requests = [
        Request(
            f"{temperature} {i}",
            [draw.randrange(most // 2) for _ in range(PROMPT)],
            max_tokens=tokens,
            temperature=temperature,
            seed=i,
            ignore_eos=True,
        )
        for i in range(WRITERS)
    ]
    events = engine.generate_all(requests)
    assert all(isinstance(event, TokenEvent) for event in events)
    return [[*request.input_ids, *event.token_ids] for request, event in zip(requests, events, strict=True)]


@torch.inference_mode()
def judged(model: MQWenLMHeadModel, texts: list[list[int]]) -> tuple[torch.Tensor, float]:
    """The likeliest token at each place after the prompts, and the mean of -log of what stands there."""
    best, losses = [], []
    for text in texts:
        ids = torch.tensor([text], device=model.device)
        logits = model(ids, use_cache=False).logits[0, PROMPT - 1 : -1].float()
        logits[:, model.config.image_token_id] = -torch.inf
        best.append(logits.argmax(-1).cpu())
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, PROMPT:]).item())
    return torch.cat(best), sum(losses) / len(losses)


def common(one: list[int], other: list[int]) -> int:
    """Tokens after the prompt before the first that differs."""
    pairs = zip(one[PROMPT:], other[PROMPT:], strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(one) - PROMPT)


def compared(
    name: str,
    model: MQWenLMHeadModel,
    processor: MQWenProcessor,
    counts: list[int],
    copy: float,
    tokens: int,
    deadline: float,
) -> Iterator[dict[str, Any]]:
    """A line for each measurement. The model is in 8 bits afterwards."""
    config, texts, greedy = model.config, list[list[int]](), dict[str, list[list[int]]]()
    judgement: dict[str, tuple[torch.Tensor, float]] = {}
    length = min(1024, config.seq_length)
    for kind, float8 in KINDS.items():
        settings = EngineSettings(
            model_name=name, max_batch_size=max([WRITERS, *counts]), max_length=length, max_step_positions=8192,
            float8=float8,
        )  # fmt: skip
        started = time.perf_counter()
        engine = Engine(model, processor, settings)
        read = size_of(model)
        print(f"{name}, {kind}: engine in {time.perf_counter() - started:.1f} s, {read / 1e9:.2f} GB", flush=True)
        element = model.transformer.wte.weight.element_size()
        position = 2 * config.num_hidden_layers * config.hidden_size * element

        def limit(count: int, context: float, read: int = read, position: int = position) -> float:
            return count * copy / (read + count * context * position)

        try:
            if not texts:
                texts = answers(engine, config, tokens // 2, 1.0)
            greedy[kind] = answers(engine, config, tokens // 2, 0.0)
            for count in counts:
                if time.monotonic() < deadline:
                    case = run_case(engine, "text", count, tokens, config, limit, kind, 1)
                    yield {
                        "model": name, "kind": kind, "requests": count, "tokens/s": case.tokens_per_s,
                        "between, ms": case.between, "first, ms": case.first, "GB": read / 1e9,
                        "of the limit": case.share_of_ceiling,
                    }  # fmt: skip
        finally:
            asyncio.run(engine.drain())
            del engine
            gc.collect()
        judgement[kind] = judged(model, texts)
    (best, plain), (ours, rounded) = judgement["bfloat16"], judgement["float8"]
    yield {
        "model": name,
        "same likeliest token": (best == ours).float().mean().item(),
        "tokens before greedy answers part": sum(map(common, *greedy.values())) / WRITERS,
        "of": tokens // 2,
        "perplexity": math.exp(plain),
        "in 8 bits": math.exp(rounded),
        "nats more": rounded - plain,
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="folder with a qwen.tiktoken")
    parser.add_argument("--models", nargs="*", choices=["1.8B", "7B"], default=["1.8B", "7B"])
    parser.add_argument("--artifact", type=Path, help="instead of models with random weights")
    parser.add_argument("--minutes", type=float, default=3.0, help="no case begins later")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * given.minutes
    device = torch.device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu")
    about, lines = machine(device), list[dict[str, Any]]()
    if given.artifact:
        processor = MQWenProcessor.from_pretrained(given.artifact)
        model = MQWenLMHeadModel.from_pretrained(given.artifact).eval().to(device)
        lines += compared(given.artifact.name, model, processor, [], 1.0, 128, deadline)
        report(given.out, about, lines)
        return lines
    copy = ceilings(device, *((64, 0.01) if given.tiny else (8192, 0.2))).copy
    about |= {"copy": f"{copy / 1e12:.2f} TB/s, read and written"}
    tokenizer = MQWenTokenizer.from_pretrained(given.tokenizer)
    for name in given.models:
        changes = (TINY | {"vocab_size": tokenizer.vocab_size}) if given.tiny else QWEN_7B if name == "7B" else {}
        counts = [1, 2] if given.tiny else [1, 16, 64, 256] if name == "1.8B" else [1, 64]
        config = MQWenConfig(**changes, image_token_id=tokenizer.image_token_id)
        processor = MQWenProcessor(tokenizer, image_size=config.vision_config.image_size)

        attempt(name, partial(measure, name, config, processor, counts, copy, given, deadline, about, lines))
    return lines


def measure(
    name: str,
    config: MQWenConfig,
    processor: MQWenProcessor,
    counts: list[int],
    copy: float,
    given: argparse.Namespace,
    deadline: float,
    about: dict[str, str],
    lines: list[dict[str, Any]],
) -> None:
    """Adds to `lines`, and reports them all."""
    model = built(config, torch.device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu"))
    for line in compared(name, model, processor, counts, copy, 16 if given.tiny else 256, deadline):
        lines.append(line)
        print(line, flush=True)
        report(given.out, about, lines)


def report(folder: Path, about: dict[str, str], lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    rows = ["# Serving in 8 bits beside bfloat16", "", *(f"- {name}: {value}" for name, value in about.items())]
    rows.append(f"- date: {now:%F %H:%M} UTC")
    heads: list[str] = []
    for line in sorted(lines, key=lambda line: "kind" not in line):
        if list(line) != heads:
            heads = list(line)
            rows += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        cells = (f"{value:,.4g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"
                 if isinstance(value, float) else str(value) for value in line.values())  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    stem = folder / f"{now:%F}-serve_float8"
    stem.with_suffix(".md").write_text("\n".join(rows) + "\n")
    stem.with_suffix(".json").write_text(json.dumps({"about": about, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
