"""transformers' generate on batches: padding, pictures, beams, sampling, stop words, streams, several turns."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mqwen.model import MQWenCache, MQWenConfig, MQWenLMHeadModel
from mqwen.model.errors import CacheError, GenerationError, LengthError
from mqwen.model.generation import StopWordsLogitsProcessor
from tests.model.golden import IMAGE_TOKEN, tiny_model, whole
from tests.model.small import SEQ_LENGTH, small_model

NO_END = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> MQWenLMHeadModel:
    return tiny_model()


def prompts(count: int, seed: int) -> tuple[list[list[int]], list[Tensor]]:
    """Prompts of 3 to 20 ids with none to two pictures each; features of the pictures, one tensor a prompt."""
    draw = random.Random(seed)
    ids, images = [], []
    for _ in range(count):
        row = [draw.randrange(IMAGE_TOKEN) for _ in range(draw.randint(3, 20))]
        for _ in range(pictures := draw.choice([0, 1, 1, 2])):
            row.insert(draw.randrange(len(row)), IMAGE_TOKEN)
        ids.append(row)
        images.append(torch.randn(pictures, 16, 64, generator=torch.Generator().manual_seed(draw.randrange(10**6))))
    return ids, images


def batch(ids: list[list[int]], images: list[Tensor]) -> dict[str, Any]:
    """Left-padded ids, mask, and all pictures."""
    width = max(map(len, ids))
    return {
        "inputs": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        "images": torch.cat(images),
    }


def new_tokens(output: Tensor, given: dict[str, Any]) -> list[list[int]]:
    return output[:, given["inputs"].shape[1] :].tolist()


@torch.no_grad()
def test_greedy_tokens_part_only_at_ties(model: MQWenLMHeadModel, capsys: pytest.CaptureFixture[str]) -> None:
    """A padded batch against each prompt alone without generate or cache: the whole row again for each token. They may
    part only where the top two logits differ by less than 1e-4."""
    ids, images = prompts(48, seed=1)
    given = batch(ids, images)
    ours = new_tokens(model.generate(**given, max_new_tokens=16, **NO_END), given)
    parted = 0
    for row, features, tokens in zip(ids, images, ours, strict=True):
        logits = model(torch.tensor([row + tokens[:-1]]), images=features).logits[0, -len(tokens) :]
        top = logits.topk(2)
        for token, (best, next_best), (first, second) in zip(tokens, top.indices, top.values, strict=True):
            if token != best:
                parted += 1
                assert token == next_best and first - second < 1e-4
    with capsys.disabled():
        print(f"\ngreedy tokens that parted at a tie: {parted} of {48 * 16}")


@torch.no_grad()
def test_beams_of_a_batch_equal_beams_without_a_cache(model: MQWenLMHeadModel) -> None:
    ids, images = prompts(3, seed=2)
    given = batch(ids, images)
    options = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, **NO_END}
    together = new_tokens(model.generate(**given, **options), given)
    assert len(together) == 6
    for number, (row, features) in enumerate(zip(ids, images, strict=True)):
        alone = batch([row], [features])
        again = new_tokens(model.generate(**alone, use_cache=False, **options), alone)
        assert together[2 * number : 2 * number + 2] == again


@torch.no_grad()
def test_several_answers_keep_their_own_pictures(model: MQWenLMHeadModel) -> None:
    """Two pictures in a row: repeating the row must not shuffle them."""
    ids = [[5, IMAGE_TOKEN, 9, IMAGE_TOKEN, 3], [IMAGE_TOKEN, 8, 8, 4, 1]]
    given = batch(ids, list(torch.randn(3, 16, 64).split([2, 1])))
    plain = new_tokens(model.generate(**given, max_new_tokens=6, **NO_END), given)
    options = NO_END | {"do_sample": True, "top_k": 1}
    several = new_tokens(model.generate(**given, max_new_tokens=6, num_return_sequences=2, **options), given)
    assert several == [plain[0], plain[0], plain[1], plain[1]]


@torch.no_grad()
def test_sampling_repeats_with_its_seed(model: MQWenLMHeadModel) -> None:
    given = batch(*prompts(3, seed=3))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        options = NO_END | {"do_sample": True, "temperature": 1.5}
        drawn.append(new_tokens(model.generate(**given, max_new_tokens=12, **options), given))
    assert drawn[0] == drawn[1] != drawn[2]


@torch.no_grad()
def test_stop_words_end_each_row_by_itself(model: MQWenLMHeadModel) -> None:
    ids, images = prompts(3, seed=4)
    given = batch(ids, images)
    free = new_tokens(model.generate(**given, max_new_tokens=10, **NO_END), given)
    words = [free[0][2:4], free[1][5:7]]
    stop = StopWordsLogitsProcessor(words, 511, prompt_length=given["inputs"].shape[1])
    options = NO_END | {"eos_token_id": 511}
    stopped = new_tokens(model.generate(**given, max_new_tokens=10, logits_processor=[stop], **options), given)
    for row, was in zip(stopped, free, strict=True):
        end = min((i + 2 for i in range(9) if was[i : i + 2] in words), default=10)
        assert row[:end] == was[:end]
        assert all(token in (511, 0) for token in row[end:])
    assert stopped[0][4] == 511


@torch.no_grad()
def test_a_stop_word_in_the_prompt_does_not_stop() -> None:
    scores = torch.zeros(2, 8)
    ids = torch.tensor([[1, 2, 3], [1, 3, 2]])
    assert torch.equal(StopWordsLogitsProcessor([[2, 3]], 7, prompt_length=2)(ids, scores), scores)
    assert StopWordsLogitsProcessor([[2, 3]], 7)(ids, scores)[:, 7].tolist() == [2.0**15, 0.0]


@torch.no_grad()
def test_streamer_gets_prompt_and_tokens(model: MQWenLMHeadModel) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.got: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer, ids = Collect(), whole("c4_decode.input_ids")
    output = model.generate(
        ids, pixel_values=whole("c4_decode.pixel_values"), streamer=streamer, max_new_tokens=8, **NO_END
    )
    assert streamer.got == output[0].tolist() and streamer.ended


@torch.no_grad()
def test_a_second_turn_goes_on_from_the_cache(model: MQWenLMHeadModel) -> None:
    """The whole conversation's ids with the first turn's cache and the second turn's picture only, against no cache."""
    first, images = prompts(1, seed=5)
    pictures = torch.randn(1, 16, 64)
    given = batch(first, images)
    turn = model.generate(**given, max_new_tokens=5, return_dict_in_generate=True, **NO_END)
    cache = turn.past_key_values
    assert isinstance(cache, MQWenCache)
    ids = torch.cat([turn.sequences, torch.tensor([[7, IMAGE_TOKEN, 12, 30]])], 1)
    going_on = model.generate(ids, images=pictures, past_key_values=cache, max_new_tokens=5, **NO_END)
    fresh = model.generate(ids, images=torch.cat([*images, pictures]), max_new_tokens=5, **NO_END)
    assert torch.equal(going_on, fresh)


@torch.no_grad()
def test_requests_side_by_side_keep_their_alpha() -> None:
    """A short prefill, and a training step's forward, between the prefill and the steps of a long row."""
    model = small_model()
    long = torch.randint(0, 60, (1, SEQ_LENGTH + 9), generator=torch.Generator().manual_seed(0))
    runs = []
    for disturbed in (False, True):
        cache = model(long, use_cache=True).past_key_values
        if disturbed:
            model(long[:, :5], use_cache=True)
            model.train()(long)
            model.eval()
        runs.append(torch.cat([model(long[:, i : i + 1], past_key_values=cache).logits for i in range(4)], 1))
    assert cache.alpha.tolist() == [3.0]
    assert torch.equal(*runs)


@torch.no_grad()
def test_crop_takes_places_back() -> None:
    model = small_model()
    cache = model(
        torch.tensor([[1, 2, 3], [0, 4, 5]]), attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]])
    ).past_key_values
    once = model(torch.tensor([[6], [7]]), past_key_values=cache).logits
    model(torch.tensor([[8], [9]]), past_key_values=cache)
    cache.crop(-2)
    assert cache.lengths.tolist() == [3, 2] and cache.get_seq_length() == 3
    assert torch.equal(model(torch.tensor([[6], [7]]), past_key_values=cache).logits, once)


@torch.no_grad()
def test_no_length_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """transformers warns past max_position_embeddings; what comes is what steps on the cache give."""
    model = MQWenLMHeadModel(MQWenConfig(**small_model().config.to_dict() | {"max_position_embeddings": SEQ_LENGTH}))
    model.load_state_dict(small_model().state_dict())
    ids = torch.randint(1, 60, (1, SEQ_LENGTH - 2), generator=torch.Generator().manual_seed(3))  # 0 is padding
    output = model.eval()(ids, use_cache=True)
    expected = []
    for _ in range(8):
        expected.append(output.logits[0, -1].argmax().item())
        output = model(torch.tensor([expected[-1:]]), past_key_values=output.past_key_values)
    found = model.generate(ids, max_new_tokens=8, **NO_END)
    assert found[0, SEQ_LENGTH - 2 :].tolist() == expected
    assert f"predefined maximum length ({SEQ_LENGTH})" in caplog.text


def test_what_generate_cannot_do_is_refused(model: MQWenLMHeadModel) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(GenerationError, match="cache_implementation"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(GenerationError, match="prefill_chunk_size"):
        model.generate(ids, prefill_chunk_size=2, max_new_tokens=2)
    training = MQWenLMHeadModel(small_model().config).train()
    training.gradient_checkpointing_enable()
    with pytest.raises(CacheError, match="use_cache=False"):
        training(ids, use_cache=True)
    cache = model(ids).past_key_values
    with pytest.raises(LengthError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(5), past_key_values=cache)
    with pytest.raises(CacheError, match="1 rows, the call has 2"):
        model(torch.tensor([[1], [2]]), past_key_values=cache)
