"""Decoding by the kernels against the runner's plain torch, at more sequences than each kind of product takes."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from mqwen.engine.adapters import Adapters
from mqwen.engine.cuda import network
from mqwen.engine.cuda.network import FEW, Network, Tables
from mqwen.engine.request import Request
from mqwen.engine.runner import Runner
from mqwen.engine.scheduler import Work
from mqwen.engine.sequence import Sequence
from mqwen.engine.text import TextStream
from mqwen.model import MQWenConfig, MQWenLMHeadModel

SIZE = 16
# A card multiplies float32 by its tensor cores, in fewer bits.
CLOSE = {"atol": 5e-3, "rtol": 1e-2} if torch.cuda.is_available() else {"atol": 1e-5, "rtol": 1e-4}
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


def test_decoding_is_that_of_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "OVERLAP", torch.cuda.is_available())  # the interpreter has no kernel before another
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MQWenLMHeadModel(CONFIG).eval().to(device)
    draw = np.random.default_rng(0)
    lengths = [5, 33, 100, 70, 2, 16, 17, 31, 64, 90, 12, 44, 55, 66, 77, 88, 99]
    runner = Runner(model, Adapters(model, {}), rows=len(lengths), max_length=160, blocks=160, size=SIZE)
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
    with torch.inference_mode():
        logits, rows, positions = runner.forward([Work(s, 0, n, True) for s, n in zip(sequences, lengths, strict=True)])
        runner.ids[rows, positions] = logits.argmax(-1)
        before = [(keys.clone(), values.clone()) for keys, values in cache]
        kernels = Network(model, cache, tables)
        for count in (1, 3, FEW + 1):
            for (keys, values), (old_keys, old_values) in zip(cache, before, strict=True):
                keys.copy_(old_keys)
                values.copy_(old_values)
            works = [Work(s, n, n + 1, True) for s, n in zip(sequences[:count], lengths, strict=False)]
            expected, _, _ = runner.forward(works)
            written = [keys.clone() for keys, _ in cache]
            for (keys, values), (old_keys, old_values) in zip(cache, before, strict=True):
                keys.copy_(old_keys)
                values.copy_(old_values)
            ours = kernels.decode(rows[:count], positions[:count])
            torch.testing.assert_close(ours, expected, **CLOSE)
            for (keys, _), theirs in zip(cache, written, strict=True):
                torch.testing.assert_close(keys, theirs, **CLOSE)
