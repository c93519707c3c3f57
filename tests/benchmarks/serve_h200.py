"""The engine with Qwen-1.8B and CLIP-L on one H200: `PYTHONPATH=platform:. python tests/benchmarks/serve_h200.py`.

Random weights, bfloat16. First the rate at which the card copies, which with the bytes that a step must read makes the
limit; then (a) 320 random tokens in and 256 out, greedy and sampled; (b) a picture and 64 tokens in, 128 and 512 out;
each for 1, 16, 64 and 256 requests at once; the time of prompts alone; transformers' generate on the same requests as
one static batch; how often greedy tokens are its own; the service under Ray Serve over HTTP, with clients in other
processes, beside the engine alone with a replica's settings and the same token ids; and the time from the start of a
process to its first token from an artifact on disk. `--parts` picks some of these. Writes a dated Markdown file and the
same as JSON into `--out`. `--tiny` shows on a CPU that all of it runs.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from mqwen.engine.engine import Engine, EngineSettings
from mqwen.engine.request import Request
from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor, MQWenTokenizer
from tests.benchmarks.h200.measure import attempt, ceilings, machine
from tests.benchmarks.h200.served import Served, conversations, engine_alone, under_serve

PARTS = ("cases", "prompts", "agreement", "static", "served", "start")
RESULTS = Path(__file__).parent / "results"


@dataclass
class Case:
    """tokens_per_s: of all requests, from the first sent to the last answered. decode_tokens_per_s: by the median
    time from one token to the next.

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


def make_requests(count: int, kind: str, out: int, vocab: int, image: int, seed: str) -> list[Request]:
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


async def streamed(engine: Engine, requests: list[Request]) -> tuple[list[float], list[float]]:
    """Seconds to each first token, and between tokens: those that come together share their time."""
    first, between = [], []
    begun = time.perf_counter()

    async def one(request: Request) -> None:
        last = begun
        async for event in engine.generate(request):
            now, count = time.perf_counter(), len(event.token_ids)
            if event.completion_tokens == count:
                first.append(now - begun)
            elif count:
                between.extend([(now - last) / count] * count)
            last = now

    await asyncio.gather(*(one(request) for request in requests))
    return first, between


def run_case(
    engine: Engine,
    kind: str,
    count: int,
    out: int,
    config: MQWenConfig,
    limit: Callable[[int, float], float],
    dtype: str,
    repeats: int,
) -> Case:
    image = config.image_token_id
    seeds = iter(range(1_000_000))  # with the case's name: no case shares a prompt with another
    draw = lambda: make_requests(count, kind, out, config.vocab_size, image, f"{kind} {count} {out} {next(seeds)}")  # noqa: E731
    found = engine.stats().prefix_hits
    asyncio.run(whole(engine, draw()))
    seconds = statistics.median([asyncio.run(whole(engine, draw())) for _ in range(repeats)])
    first, between = [], []
    for _ in range(9 if count == 1 else 1):
        some_first, some_between = asyncio.run(streamed(engine, draw()))
        first, between = first + some_first, between + some_between
    assert engine.stats().prefix_hits == found, "prompts were found in the cache"
    prompt = 320 if kind != "picture" else 64 + config.image_positions
    ceiling = limit(count, prompt + out / 2)
    rate = count * out / seconds
    pieces = sorted(between)
    decode = count / statistics.median(pieces)
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


@torch.inference_mode()
def agreement(engine: Engine, model: MQWenLMHeadModel, config: MQWenConfig, out: int) -> str:
    """Each greedy token of the engine against what the model in transformers finds likeliest after the same tokens."""
    requests = make_requests(16, "text", out, config.vocab_size, config.image_token_id, "agreement")
    gaps: list[float] = []
    before_first = 0
    for request, event in zip(requests, engine.generate_all(requests), strict=True):
        ids = torch.tensor([[*request.input_ids, *event.token_ids]], device=model.device)
        logits = model(ids, use_cache=False).logits[0, len(request.input_ids) - 1 : -1].float()
        logits[:, config.image_token_id] = -torch.inf
        best = logits.argmax(-1)
        ours = ids[0, len(request.input_ids) :]
        others = (best != ours).nonzero().flatten().tolist()
        before_first += others[0] if others else out
        gaps += [(logits[i, best[i]] - logits[i, ours[i]]).item() for i in others]
    total = len(requests) * out
    p95 = statistics.quantiles(gaps, n=20)[-1] if len(gaps) > 1 else 0.0
    return (
        f"Greedy tokens: {total - len(gaps)} of {total} ({1 - len(gaps) / total:.2%}) are those that transformers "
        "finds likeliest after the same tokens. Where they part, the logit of its own is larger by "
        f"{statistics.median(gaps or [0]):.4f} in the median, {p95:.4f} at p95, {max(gaps, default=0):.4f} at most. "
        f"Tokens before an answer's first that differs: {before_first / len(requests):.0f} of {out} in the mean."
    )


def prompts_alone(engine: Engine, count: int, config: MQWenConfig) -> str:
    """From the first request sent to the last first token."""
    make = lambda i: make_requests(  # noqa: E731
        count, "text", 1, config.vocab_size, config.image_token_id, f"prompts {count} {i}"
    )
    asyncio.run(whole(engine, make(0)))
    times = [1e3 * asyncio.run(whole(engine, make(1 + i))) for i in range(12 if count == 1 else 4)]
    return f"Prompts of {count} requests: {statistics.median(times):.2f} ms in the median, {min(times):.2f} at best."


@torch.inference_mode()
def static_batch(model: MQWenLMHeadModel, config: MQWenConfig, count: int, out: int) -> str:
    """transformers' generate on the same requests, which are all of one length."""
    requests = make_requests(count, "text", out, config.vocab_size, config.image_token_id, "static")
    ids = torch.tensor([list(request.input_ids) for request in requests], device=model.device)
    begun = time.perf_counter()
    answer = model.generate(ids, max_new_tokens=out, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answer.shape[1] == ids.shape[1] + out
    seconds = time.perf_counter() - begun
    return f"transformers' generate, {count} requests as one batch: {count * out / seconds:,.0f} tokens/s."


def release() -> None:
    """What nobody holds any more, for other processes of the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def start(folder: Path, device: torch.device, *, compiled: bool) -> str:
    """A process that loads an artifact as a replica does, and answers one request. compiled: whether one did so here
    before, so that Triton finds the kernels."""
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, "-m", "tests.benchmarks.h200.start", str(folder), str(device), str(time.time())]
        env = os.environ if compiled else os.environ | {"TRITON_CACHE_DIR": empty}
        told = subprocess.run(command, capture_output=True, text=True, env=env)
    if told.returncode:
        return f"A start from {folder} failed: {told.stderr[-400:]}"
    kernels = "kernels compiled before" if compiled else "kernels not compiled yet"
    return (
        f"From the start of a process to its first token, {size:.1f} GB on local disk, {kernels}: "
        f"{told.stdout.splitlines()[-1]}."
    )


def compare(alone: list[Served], served: list[Served]) -> str:
    """A table, and what Ray Serve costs."""
    through = " through HAProxy" if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else ""
    lines = [
        f"The service under Ray Serve over HTTP{through}, a picture and 64 tokens in a chat (greedy, streamed):",
        "",
    ]
    lines += ["| requests | out | what | tokens/s | first, ms | p99 | between, ms |", "|---|---|---|---|---|---|---|"]
    for name, those in (("engine alone", alone), ("Ray Serve", served)):
        lines += [
            f"| {s.requests} | {s.out} | {name} | {s.tokens_per_s:,.0f} | {s.first:.1f} | {s.first_p99:.1f} | "
            f"{s.between:.2f} |"
            for s in those
        ]
    lines.append("")
    for ours, theirs in zip(alone, served, strict=True):
        lines.append(
            f"{ours.requests} at once, {ours.out} out: Ray Serve adds {theirs.first - ours.first:.1f} ms to the first "
            f"token and has {theirs.tokens_per_s / ours.tokens_per_s:.2f} of the engine's tokens/s."
        )
    return "\n  ".join(lines)


def main(arguments: list[str] | None = None) -> list[Case]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", nargs="*", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--kinds", nargs="*", default=["text", "sampled", "picture"])
    parser.add_argument("--repeats", type=int, default=3, help="of each case, after one that warms up")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--served", nargs="*", type=int, default=[1, 16, 64], help="requests at once, by HTTP")
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
    settings = EngineSettings(max_batch_size=most, max_length=1024, max_step_positions=8192, picture_threads=14)
    processor = MQWenProcessor(tokenizer, image_size=config.vision_config.image_size)
    artifact = tempfile.TemporaryDirectory()
    if {"served", "start"} & set(given.parts):
        model.save_pretrained(artifact.name)
        processor.save_pretrained(artifact.name)
    engine = Engine(model, processor, settings)
    print(f"engine ready in {time.perf_counter() - started:.1f} s", flush=True)
    cases: list[Case] = []
    for kind in given.kinds if "cases" in given.parts else ():
        for count in given.requests:
            for tokens in (out // 2, long) if kind == "picture" else (out,):
                if time.monotonic() - begun < 60 * given.minutes:
                    cases.append(
                        run_case(engine, kind, count, tokens, config, limit, str(dtype).split(".")[1], given.repeats)
                    )
    told: list[str] = []

    def tell(name: str, work: Callable[[], str]) -> None:
        if text := attempt(name, work):
            told.append(text)
            print(text, flush=True)
            report(cases, about, found.copy, told, given.out)  # whatever becomes of the rest

    ends = sorted({min(given.requests), most})
    if "prompts" in given.parts:
        for count in ends:
            tell("prompts", partial(prompts_alone, engine, count, config))
    if "agreement" in given.parts:
        tell("agreement", partial(agreement, engine, model, config, out // 2))
    asyncio.run(engine.drain())
    del engine
    release()
    if "static" in given.parts:
        for count in ends:
            tell("static batch", partial(static_batch, model, config, count, out))
    outs, alone = [out // 2, long], []
    draw = partial(conversations, tokenizer, size=config.vision_config.image_size)
    if "served" in given.parts:
        replica = Engine(model, processor, EngineSettings())
        alone = engine_alone(replica, tokenizer, draw, given.served, outs)
        asyncio.run(replica.drain())
        del replica
    del model
    release()  # the device is others' from here on
    if "served" in given.parts:
        gpus = int(device.type == "cuda")
        tell("Ray Serve", lambda: compare(alone, under_serve(Path(artifact.name), gpus, draw, given.served, outs)))
    if "start" in given.parts:
        for compiled in (True, False):
            tell("start", partial(start, Path(artifact.name), device, compiled=compiled))
    report(cases, about, found.copy, told, given.out)
    return cases


def report(cases: list[Case], about: dict[str, str], copy: float, told: list[str], folder: Path) -> None:
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
    lines += ["", *(f"- {line}" for line in told), ""]
    stem = folder / f"{now:%F}-serve_h200"
    stem.with_suffix(".md").write_text("\n".join(lines))
    stem.with_suffix(".json").write_text(
        json.dumps({"facts": facts, "cases": [asdict(c) for c in cases], "told": told}, indent=1)
    )


if __name__ == "__main__":
    main()
