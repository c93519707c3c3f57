"""The LLaVA export: transformers loads it without code of ours and computes the same."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from mqwen.model import MQWenConfig, MQWenLMHeadModel, MQWenProcessor, MQWenTokenizer
from mqwen.model.errors import ConfigurationError
from mqwen.model.llava import export_llava
from mqwen.model.vocabulary import train_vocabulary

WORDS = ["what", "is", "in", "the", "picture", "and", "this", "one", "a cat", "on", "sofa", "图里有什么", "一只猫"]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> MQWenProcessor:
    path = tmp_path_factory.mktemp("vocabulary") / "qwen.tiktoken"
    train_vocabulary([*WORDS, "system user assistant"], 300, path)
    return MQWenProcessor(MQWenTokenizer(path), image_size=28)


@pytest.fixture(scope="module")
def model(processor: MQWenProcessor) -> MQWenLMHeadModel:
    torch.manual_seed(0)
    config = MQWenConfig(
        vocab_size=processor.tokenizer.vocab_size + 5,  # rows without a meaning, as in the published models
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        kv_channels=16,
        intermediate_size=256,
        seq_length=192,
        rotary_emb_base=25_000,
        layer_norm_epsilon=1e-5,
        initializer_range=0.08,
        image_token_id=processor.tokenizer.image_token_id,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 7,
            "initializer_factor": 2.0,
        },
    )
    model = MQWenLMHeadModel(config).eval()
    with torch.no_grad():  # parameters that start at one, zero or nearly so would hide a swap
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    return model


@pytest.fixture(scope="module")
def folder(model: MQWenLMHeadModel, processor: MQWenProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    export_llava(model, processor, folder)
    return folder


@pytest.fixture(scope="module")
def llava(folder: Path) -> LlavaForConditionalGeneration:
    llava, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return llava.eval()


def requests() -> list[tuple[list[dict], list[Image.Image]]]:
    """50 conversations of one to three turns, with 0 to 3 pictures in all."""
    rng = random.Random(0)
    pixels = np.random.default_rng(0)
    made = []
    for number in range(50):
        pictures = [Image.fromarray(pixels.integers(0, 256, (31, 40, 3), dtype=np.uint8)) for _ in range(number % 4)]
        parts = [{"type": "image"} for _ in pictures]
        parts += [{"type": "text", "text": " ".join(rng.choices(WORDS, k=3))} for _ in range(2)]
        rng.shuffle(parts)
        messages = [{"role": "user", "content": "what is"}, {"role": "assistant", "content": "a cat"}] * rng.randrange(
            3
        )
        made.append(([*messages, {"role": "user", "content": parts}], pictures))
    return made


def test_50_random_requests_give_equal_logits_and_greedy_tokens(
    model: MQWenLMHeadModel, processor: MQWenProcessor, llava: LlavaForConditionalGeneration, folder: Path
) -> None:
    theirs_processor = AutoProcessor.from_pretrained(folder)
    positions = model.config.image_positions
    worst, asked, tokens = 0.0, 0, set()
    for messages, pictures in requests():
        ours = processor(messages=messages, images=pictures, return_tensors="pt")
        prompt = theirs_processor.apply_chat_template(messages, add_generation_prompt=True)
        theirs = theirs_processor(text=prompt, images=pictures or None, return_tensors="pt")
        assert theirs["input_ids"].shape[1] == ours["input_ids"].shape[1] + len(pictures) * (positions - 1)
        if pictures:
            torch.testing.assert_close(theirs["pixel_values"], ours["pixel_values"], rtol=0, atol=2e-6)
        with torch.no_grad():
            difference = model(**ours).logits - llava(**theirs).logits
            limits = {"max_new_tokens": 6, "do_sample": False}
            ends = {"eos_token_id": processor.tokenizer.stop_ids}  # theirs reads them from generation_config.json
            mine = model.generate(**ours, **limits, **ends)[0, ours["input_ids"].shape[1] :].tolist()
            served = llava.generate(**theirs, **limits)[0, theirs["input_ids"].shape[1] :].tolist()
        worst = max(worst, difference.abs().max().item())
        assert mine == served
        tokens.update(mine)
        asked += 1
    assert asked == 50
    assert worst <= 5e-5
    assert len(tokens) > 20, "a model that always says the same would prove little"


def test_the_folder_holds_what_servers_need(folder: Path, model: MQWenLMHeadModel, processor: MQWenProcessor) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["max_position_embeddings"] == model.config.seq_length
    assert config["image_token_index"] == processor.tokenizer.image_token_id
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == processor.tokenizer.stop_ids
    assert {"tokenizer.json", "preprocessor_config.json", "chat_template.jinja"} <= {p.name for p in folder.iterdir()}
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    starts = (
        "language_model.model.",
        "language_model.lm_head.",
        "vision_tower.vision_model.",
        "multi_modal_projector.",
    )
    assert all(name.startswith(starts) for name in names)  # the names vLLM reads
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is LlavaForConditionalGeneration


def test_shards_dtype_and_sampling_are_kept_and_a_second_export_replaces_the_first(
    model: MQWenLMHeadModel, processor: MQWenProcessor, tmp_path: Path
) -> None:
    export_llava(model, processor, tmp_path)
    half = MQWenLMHeadModel(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config.update(do_sample=True, top_p=0.7)
    export_llava(half, processor, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert (loaded.generation_config.do_sample, loaded.generation_config.top_p) == (True, 0.7)
    assert loaded.generation_config.eos_token_id == processor.tokenizer.stop_ids
    assert loaded.lm_head.weight.equal(half.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_pct": 0.5}, "rotary_pct 0.5"),
        ({"image_token_id": 7}, "image_token_id is 7 in the model"),
        ({"vocab_size": 507}, "507 rows"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean and image_std differ"),
        ({"vision_config": {"image_size": 56, "patch_size": 7}}, "pictures of 28 pixels, the model takes 56"),
    ],
)
def test_what_llava_cannot_express_is_refused(
    model: MQWenLMHeadModel, processor: MQWenProcessor, tmp_path: Path, change: dict, message: str
) -> None:
    config = MQWenConfig(**{**model.config.to_dict(), **change})
    small = MQWenLMHeadModel.__new__(MQWenLMHeadModel)
    torch.nn.Module.__init__(small)
    small.config = config
    with pytest.raises(ConfigurationError, match=message):
        export_llava(small, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()
