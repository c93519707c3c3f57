"""Tokens a second of the engine beside transformers' generate, one by one and in left-padded batches.

python -m tests.benchmarks.engine_cpu [--rounds 3]

A model of the demo's size with random weights, greedy. Each request has one to three pictures that no other has, a
prompt of mixed length, and between 16 and 128 tokens to generate, whatever they are. With n requests at once, the
engine always has n; batches take n, and each lasts until its longest answer is done. Decoding pictures is in all times.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import tyro

from mqwen.data.sources.digits import vocabulary_texts
from mqwen.engine.engine import Engine, EngineSettings
from mqwen.engine.request import Request
from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor, MQWenTokenizer
from mqwen.model.chat import encode_chat
from mqwen.model.vocabulary import train_vocabulary
from mqwen.train.recipes import demo
from tests.benchmarks.result import write_result
from tests.engine.tiny import picture

AT_ONCE = (1, 4, 16, 32, 64)


@dataclass(frozen=True)
class EngineCPU:
    rounds: int = 3
    threads: int = 2


def demo_model(folder: Path) -> tuple[MQWenLMHeadModel, MQWenProcessor]:
    train_vocabulary(vocabulary_texts(), 512, folder / "qwen.tiktoken")
    tokenizer = MQWenTokenizer(folder / "qwen.tiktoken")
    config = MQWenConfig(
        **demo().model.config, vocab_size=tokenizer.vocab_size, image_token_id=tokenizer.image_token_id
    )
    torch.manual_seed(0)
    return MQWenLMHeadModel(config).eval(), MQWenProcessor(tokenizer, image_size=config.vision_config.image_size)


def draw_requests(processor: MQWenProcessor, count: int, seed: int) -> list[Request]:
    random = Random(seed)
    made = []
    for number in range(count):
        pictures = [picture(random.getrandbits(40)) for _ in range(random.randrange(1, 4))]
        text = "".join(random.choices("How many digits are there? 图片里是哪个数字", k=random.randrange(5, 60)))
        parts = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": text}]
        ids = encode_chat(
            processor.tokenizer, [{"role": "user", "content": parts}], add_generation_prompt=True
        ).input_ids
        made.append(Request(f"{seed} {number}", ids, pictures, random.randrange(16, 129), ignore_eos=True))
    return made


def by_engine(engine: Engine, requests: list[Request], at_once: int) -> None:
    async def main() -> None:
        places = asyncio.Semaphore(at_once)

        async def one(request: Request) -> None:
            async with places:
                await engine.complete(request)  # the whole answer, as generate gives it

        await asyncio.gather(*(one(request) for request in requests))

    asyncio.run(main())


@torch.inference_mode()
def by_generate(model: MQWenLMHeadModel, processor: MQWenProcessor, requests: list[Request], at_once: int) -> None:
    for start in range(0, len(requests), at_once):
        batch = requests[start : start + at_once]
        longest = max(len(request.input_ids) for request in batch)
        pad = processor.tokenizer.eod_id
        ids = torch.tensor([[pad] * (longest - len(one.input_ids)) + list(one.input_ids) for one in batch])
        mask = torch.tensor([[0] * (longest - len(one.input_ids)) + [1] * len(one.input_ids) for one in batch])
        pixels = [processor.normalize(processor.pixels(one)) for request in batch for one in request.pictures]
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=torch.stack([torch.from_numpy(one) for one in pixels]),
            max_new_tokens=max(request.max_tokens or 0 for request in batch),
            do_sample=False,
            pad_token_id=pad,  # and no end token: nothing ends early
            suppress_tokens=[model.config.image_token_id],  # as the engine does: no picture follows
        )


def rate(work: Callable[[], None], requests: list[Request]) -> float:
    started = time.perf_counter()
    work()
    return sum(request.max_tokens or 0 for request in requests) / (time.perf_counter() - started)


def main(options: EngineCPU) -> None:
    torch.set_num_threads(options.threads)
    rates: dict[str, list[list[float]]] = {name: [[] for _ in AT_ONCE] for name in ("one", "batch", "engine")}
    with tempfile.TemporaryDirectory() as folder:
        model, processor = demo_model(Path(folder))
        engine = Engine(model, processor, EngineSettings(max_batch_size=max(AT_ONCE)))
        by_engine(engine, draw_requests(processor, 8, -1), 8)
        by_generate(model, processor, draw_requests(processor, 4, -2), 2)
        for round_ in range(options.rounds):
            for place, at_once in enumerate(AT_ONCE):
                requests = draw_requests(processor, max(8, 3 * at_once), 100 * round_ + place)
                some = requests[:8]
                sides = {
                    "one": (lambda some=some: by_generate(model, processor, some, 1), some),
                    "batch": (lambda all_=requests, n=at_once: by_generate(model, processor, all_, n), requests),
                    "engine": (lambda all_=requests, n=at_once: by_engine(engine, all_, n), requests),
                }
                for name, (work, asked) in sides.items():
                    rates[name][place].append(rate(work, asked))
        asyncio.run(engine.drain())
    lines = [
        "| at once | one by one, tokens/s | left-padded batch | engine | engine / one by one | engine / batch |",
        "|---|---|---|---|---|---|",
    ]
    for place, at_once in enumerate(AT_ONCE):
        one, batch, ours = (statistics.median(rates[name][place]) for name in ("one", "batch", "engine"))
        lines.append(f"| {at_once} | {one:.0f} | {batch:.0f} | {ours:.0f} | {ours / one:.1f} | {ours / batch:.2f} |")
    write_result("engine-cpu", f"Medians of {options.rounds} rounds, {options.threads} threads.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(EngineCPU))
