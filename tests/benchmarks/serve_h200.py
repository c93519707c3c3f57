"""The engine with Qwen-1.8B and CLIP-L on one H200: `PYTHONPATH=platform:. python tests/benchmarks/serve_h200.py`.

Random weights, bfloat16. First the rate at which the card copies, which with the bytes that a step must read makes the
limit; then (a) 320 random tokens in and 256 out, greedy and sampled; (b) a picture and 64 tokens in, 128 out; each for
1, 16, 64 and 256 requests at once; then how often greedy tokens are those of transformers' generate. Writes a dated
Markdown file and the same as JSON into `--out`. `--tiny` shows on a CPU that all of it runs.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from PIL import Image

from mqwen.engine.engine import Engine, EngineSettings
from mqwen.engine.request import Request
from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor, MQWenTokenizer
from tests.benchmarks.h200.measure import ceilings, machine

RESULTS = Path(__file__).parent / "results"


@dataclass
class Case:
    """tokens_per_s: of all requests, from the first sent to the last answered. decode_tokens_per_s: while all decode.

    share_of_ceiling: of what the copy rate allows at this batch and mean context. first, between, between_p99: ms to
    the first token, and from one token to the next, streamed.
    """

    name: str
    requests: int
    dtype: str
    tokens_per_s: float
    share_of_ceiling: float
    decode_tokens_per_s: float
    decode_share: float
    first: float
    between: float
    between_p99: float


def make_requests(count: int, kind: str, out: int, vocab: int, image: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    ids = lambda n: [draw.randrange(1000 if vocab > 2000 else 0, min(vocab, 150_000)) for _ in range(n)]  # noqa: E731
    made = []
    for i in range(count):
        name = f"{seed}-{i}"
        if kind == "picture":
            pixels = Image.effect_noise((336, 336), draw.randrange(20, 90)).convert("RGB")
            file = io.BytesIO()
            pixels.save(file, "jpeg")
            made.append(Request(name, [image, *ids(64)], [file.getvalue()], max_tokens=out, ignore_eos=True))
        elif kind == "sampled":
            made.append(
                Request(name, ids(320), max_tokens=out, ignore_eos=True, temperature=0.8, top_p=0.95, seed=i)
            )  # fmt: skip
        else:
            made.append(Request(name, ids(320), max_tokens=out, ignore_eos=True))
    return made


async def whole(engine: Engine, requests: list[Request]) -> float:
    """Seconds until all are answered."""
    begun = time.perf_counter()
    events = await asyncio.gather(*(engine.complete(request) for request in requests))
    assert all(event.completion_tokens == request.max_tokens for event, request in zip(events, requests, strict=True))
    return time.perf_counter() - begun


async def streamed(engine: Engine, requests: list[Request]) -> tuple[list[float], list[float], float]:
    """Seconds to each first token, between tokens (those that come together share their time), and while all decode."""
    first, between, ends = [], [], []
    begun = time.perf_counter()
    starts = []

    async def one(request: Request) -> None:
        last = time.perf_counter()
        async for event in engine.generate(request):
            now, count = time.perf_counter(), len(event.token_ids)
            if event.completion_tokens == count:
                first.append(now - begun)
                starts.append((now, count))
            elif count:
                between.extend([(now - last) / count] * count)
            last = now
        ends.append(last)

    await asyncio.gather(*(one(request) for request in requests))
    return first, between, min(ends) - max(now for now, _ in starts)


def run_case(
    engine: Engine,
    kind: str,
    count: int,
    out: int,
    config: MQWenConfig,
    limit: Callable[[int, float], float],
    dtype: str,
) -> Case:
    image = config.image_token_id
    make = lambda seed: make_requests(count, kind, out, config.vocab_size, image, seed)  # noqa: E731
    asyncio.run(whole(engine, make(1)))
    seconds = statistics.median([asyncio.run(whole(engine, make(seed))) for seed in (2, 3, 4)])
    first, between, _ = asyncio.run(streamed(engine, make(5)))
    prompt = 320 if kind != "picture" else 64 + config.image_positions
    ceiling = limit(count, prompt + out / 2)
    rate = count * out / seconds
    decode = count * (out - 1) / max(1e-9, seconds - statistics.median(first))
    pieces = sorted(between)
    case = Case(
        f"{kind}, {prompt} in, {out} out", count, dtype, rate, rate / ceiling, decode, decode / ceiling,
        1e3 * statistics.median(first), 1e3 * statistics.median(pieces), 1e3 * pieces[int(0.99 * len(pieces))],
    )  # fmt: skip
    print(
        f"{case.name}, {count} at once: {rate:,.0f} tokens/s, {case.share_of_ceiling:.2f} of the limit {ceiling:,.0f} "
        f"(decoding {decode:,.0f}, {case.decode_share:.2f}); first {case.first:.1f} ms, "
        f"between {case.between:.2f} ms, p99 {case.between_p99:.2f}",
        flush=True,
    )
    return case


def agreement(engine: Engine, model: MQWenLMHeadModel, config: MQWenConfig, out: int) -> str:
    """Greedy tokens of the engine against transformers' generate, one by one, up to where they part."""
    same = total = 0
    gaps = []
    for request in make_requests(8, "text", out, config.vocab_size, config.image_token_id, 9):
        [event] = engine.generate_all([request])
        ids = torch.tensor([request.input_ids], device=model.device)
        with torch.inference_mode():
            answer = model.generate(
                ids, max_new_tokens=out, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        expected = answer.sequences[0, ids.shape[1] :].tolist()
        agree = next((i for i, (a, b) in enumerate(zip(event.token_ids, expected, strict=True)) if a != b), out)
        same, total = same + agree, total + out
        if agree < out:
            top = answer.logits[agree][0].float().topk(2).values
            gaps.append((top[0] - top[1]).item())
    return (
        f"greedy tokens before the first that differs from transformers': {same} of {total}; "
        f"gaps of its two likeliest there: {', '.join(f'{gap:.3f}' for gap in gaps) or 'none'}"
    )


def main(arguments: list[str] | None = None) -> list[Case]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", nargs="*", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--kinds", nargs="*", default=["text", "sampled", "picture"])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a qwen.tiktoken")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case begins later")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu")
    about = machine(device)
    found = ceilings(device, *((64, 0.01) if given.tiny else (8192, 1.0)))
    print(about, f"\ncopy {found.copy / 1e12:.2f} TB/s", flush=True)

    tokenizer = MQWenTokenizer.from_pretrained(given.tokenizer)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "kv_channels": 32,
        "intermediate_size": 128,
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MQWenConfig(
        **({**sizes, "vision_config": vision, "vocab_size": tokenizer.vocab_size} if given.tiny else {}),
        image_token_id=tokenizer.image_token_id,
    )
    torch.manual_seed(0)
    dtype = torch.float32 if given.tiny else torch.bfloat16
    torch.set_default_dtype(dtype)
    with device:
        model = MQWenLMHeadModel(config).eval()
    torch.set_default_dtype(torch.float32)
    model.config.seq_length = config.seq_length
    weights = sum(
        p.numel() * p.element_size() for p in [*model.transformer.h.parameters(), *model.lm_head.parameters()]
    )
    element = torch.empty(0, dtype=dtype).element_size()
    position = 2 * config.num_hidden_layers * config.hidden_size * element

    def limit(count: int, context: float) -> float:
        return count * found.copy / (weights + count * context * position)

    out, long = (8, 12) if given.tiny else (256, 512)
    most = max(given.requests)
    started = time.perf_counter()
    settings = EngineSettings(max_batch_size=most, max_length=1024, max_step_positions=8192)
    engine = Engine(model, MQWenProcessor(tokenizer, image_size=config.vision_config.image_size), settings)
    print(f"engine ready in {time.perf_counter() - started:.1f} s", flush=True)
    cases = []
    for kind in given.kinds:
        for count in given.requests:
            for tokens in (out // 2, long) if kind == "picture" else (out,):
                if time.monotonic() - begun < 60 * given.minutes:
                    cases.append(run_case(engine, kind, count, tokens, config, limit, str(dtype).split(".")[1]))
    told = agreement(engine, model, config, out // 2)
    print(told)
    asyncio.run(engine.drain())
    report(cases, about, found.copy, told, given.out)
    return cases


def report(cases: list[Case], about: dict[str, str], copy: float, told: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    facts = {**about, "copy": f"{copy / 1e12:.2f} TB/s, read and written", "date": f"{now:%F %H:%M} UTC"}
    lines = ["# Serving on one H200", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| case | requests | tokens/s | of the limit | decoding | of the limit | first, ms | between, ms | p99 |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for c in cases:
        lines.append(
            f"| {c.name} | {c.requests} | {c.tokens_per_s:,.0f} | {c.share_of_ceiling:.2f} | "
            f"{c.decode_tokens_per_s:,.0f} | {c.decode_share:.2f} | "
            f"{c.first:.1f} | {c.between:.2f} | {c.between_p99:.2f} |"
        )
    lines += ["", told, ""]
    stem = folder / f"{now:%F}-serve_h200"
    stem.with_suffix(".md").write_text("\n".join(lines))
    stem.with_suffix(".json").write_text(json.dumps({"facts": facts, "cases": [asdict(c) for c in cases]}, indent=1))


if __name__ == "__main__":
    main()
