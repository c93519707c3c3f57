"""Decoding by the kernels against the runner's plain torch, at more sequences than each kind of product takes."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from mqwen.engine.adapters import Adapters
from mqwen.engine.cuda import network
from mqwen.engine.cuda.network import FEW, SOME, Network, Tables
from mqwen.engine.cuda.runner import PIECES, PromptStep
from mqwen.engine.request import Request
from mqwen.engine.runner import Runner
from mqwen.engine.scheduler import Work
from mqwen.engine.sequence import Sequence
from mqwen.engine.text import TextStream
from mqwen.model import MQWenConfig, MQWenLMHeadModel

SIZE = 16
# A card multiplies float32 by its tensor cores, in fewer bits.
CLOSE = {"atol": 1e-2, "rtol": 1e-2} if torch.cuda.is_available() else {"atol": 1e-5, "rtol": 1e-4}
CONFIG = MQWenConfig(
    vocab_size=320,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_channels=32,
    intermediate_size=192,
    seq_length=64,  # some prompts are longer: their angles and queries are scaled
    image_token_id=319,
    initializer_range=0.1,
    vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
)


def test_the_kernels_do_what_plain_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, a whole one and one's second half among them; then decoding, at each kind of product."""
    monkeypatch.setattr(network, "OVERLAP", torch.cuda.is_available())  # the interpreter has no kernel before another
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MQWenLMHeadModel(CONFIG).eval().to(device)
    draw = np.random.default_rng(0)
    lengths = [5, 33, 100, 70, 2, 16, 17, 31, 64, 90, 12, 44, 55, 66, 77, 88, 99]
    count = len(lengths)
    runner = Runner(model, Adapters(model, {}), rows=count + 1, max_length=160, blocks=160, size=SIZE)
    blocks = iter(draw.permutation(np.arange(1, 160)).tolist())
    sequences = []
    for row, length in enumerate(lengths):
        ids = draw.integers(0, 300, length)
        stream = TextStream(lambda token: b"", ())
        sequence = Sequence(Request(str(row), ids.tolist()), ids, [], 2, stream, None)
        sequence.row, sequence.alpha = row, runner.rotary.alpha(length)
        taken = torch.tensor([next(blocks) for _ in range(length // SIZE + 1)])
        runner.ids[row, :length] = torch.from_numpy(ids)
        runner._blocks[row, : len(taken)] = taken
        runner._rotary_places[row] = runner.rotary.place(sequence.alpha)
        sequences.append(sequence)
    tables = Tables(
        runner.ids, runner._blocks, runner._rotary_places, runner.rotary.angles, runner.rotary.logn, SIZE
    )  # fmt: skip
    cache = runner._cache.layers

    def take_back(before: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for now, old in zip(cache, before, strict=True):
            for some, same in zip(now, old, strict=True):
                some.copy_(same)

    def copied() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(keys.clone(), values.clone()) for keys, values in cache]

    def same_cache(expected: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for now, theirs in zip(cache, expected, strict=True):
            for some, one in zip(now, theirs, strict=True):
                torch.testing.assert_close(some[1:], one[1:], **CLOSE)  # the first block is nobody's

    with torch.inference_mode():
        kernels = Network(model, cache, tables)
        runner.forward([Work(sequences[2], 0, 41, False)])
        starts, stops = np.array([0, 0, 41, 0, 0]), np.array([5, 33, 100, 69, 2])
        samples = np.arange(5) != 3
        places = zip(sequences, starts, stops, samples, strict=False)
        works = [Work(one, int(start), int(stop), bool(last)) for one, start, stop, last in places]
        before = copied()
        expected, _, _ = runner.forward(works)
        written = copied()
        take_back(before)
        step = PromptStep(kernels, 192, PIECES, count, device)
        step.begin(np.arange(5), starts, stops - starts, samples)
        torch.testing.assert_close(step.logits()[:4], expected, **CLOSE)
        same_cache(written)

        works = [Work(one, 0, n, True) for one, n in zip(sequences, lengths, strict=True)]
        expected, rows, positions = runner.forward(works)
        runner.ids[rows, positions] = expected.argmax(-1)
        rows, positions = torch.arange(count, device=device), torch.tensor(lengths, device=device)
        before = copied()
        for several, tiles in ((1, FEW), (3, FEW), (count, SOME), (count, None)):
            monkeypatch.setattr(kernels, "tiles_for", lambda rows, tiles=tiles: tiles)
            take_back(before)
            works = [Work(s, n, n + 1, True) for s, n in zip(sequences[:several], lengths, strict=False)]
            expected, _, _ = runner.forward(works)
            written = copied()
            take_back(before)
            last = runner._blocks[rows, positions // SIZE]
            runner._blocks[rows, positions // SIZE] = 0  # what a graph is given, it writes there itself
            ours = kernels.decode(rows[:several], positions[:several], last[:several])
            runner._blocks[rows, positions // SIZE] = last
            torch.testing.assert_close(ours, expected, **CLOSE)
            same_cache(written)
