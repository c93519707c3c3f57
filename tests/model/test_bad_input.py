"""Bad input: each a typed error that names the thing, before anything is computed with it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mqwen.model import MQWenConfig, MQWenLMHeadModel
from mqwen.model.adapters import attach_adapter
from mqwen.model.errors import (
    AdapterError,
    CacheError,
    CheckpointError,
    ConfigurationError,
    LengthError,
    MQWenError,
    PictureCountError,
    PictureShapeError,
    SegmentError,
    TokenRangeError,
)
from tests.model.golden import FIXTURES, tiny_model
from tests.model.small import PICTURE, small_model

IDS = torch.tensor([[1, PICTURE, 2, 3], [4, 5, 6, 7]])
ONE = torch.zeros(1, 4, 32)
TWO = torch.zeros(2, 4, 32)

FORWARD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (PictureCountError, "1 picture placeholders in input_ids, but 0 pictures", {}),
    (PictureCountError, "1 picture placeholders in input_ids, but 2 pictures", {"images": TWO}),
    (PictureCountError, "but 2 pictures", {"pixel_values": torch.zeros(2, 3, 8, 8)}),
    (PictureCountError, "may have lost placeholders", {"images": ONE, "input_ids": IDS[:, 2:]}),
    (PictureShapeError, r"\(pictures, 4, 32\), not \(1, 4, 31\)", {"images": ONE[..., :31]}),
    (PictureShapeError, r"\(pictures, 4, 32\), not \(1, 3, 32\)", {"images": ONE[:, :3]}),
    (PictureShapeError, r"\(pictures, 3, 8, 8\), not \(1, 3, 9, 8\)", {"pixel_values": torch.zeros(1, 3, 9, 8)}),
    (PictureShapeError, "torch.int64", {"pixel_values": torch.zeros(1, 3, 8, 8, dtype=torch.long)}),
    (PictureShapeError, "not both", {"images": ONE, "pixel_values": torch.zeros(1, 3, 8, 8)}),
    (TokenRangeError, r"token id 117 lies outside of the vocabulary, 0\.\.63", {"input_ids": IDS + 57}),
    (TokenRangeError, "token id -1 ", {"input_ids": IDS - 2}),
    (TokenRangeError, "label 64 lies", {"images": ONE, "labels": torch.full((2, 4), 64)}),
    (TokenRangeError, "label -1 lies", {"images": ONE, "labels": torch.full((2, 7), -1)}),
    (LengthError, r"labels must be \(2, 4 or 7\).*given: \(2, 5\)", {"images": ONE, "labels": torch.ones(2, 5)}),
    (LengthError, r"labels must be \(2, 4 or 7\).*given: \(1, 4\)", {"images": ONE, "labels": torch.ones(1, 4)}),
    (LengthError, "attention_mask must be", {"images": ONE, "attention_mask": torch.ones(2, 6)}),
    (LengthError, r"attention_mask must be \(2, positions\)", {"images": ONE, "attention_mask": torch.ones(2, 1, 4)}),
    (LengthError, "segment_ids must be", {"images": ONE, "segment_ids": torch.ones(2, 3)}),
    (LengthError, "at least one", {"input_ids": IDS[:, :0]}),
    (SegmentError, "rising", {"images": ONE, "segment_ids": torch.tensor([[1, 1, 2, 1], [1, 1, 1, 1]])}),
    (SegmentError, "unbroken", {"images": ONE, "segment_ids": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])}),
    (SegmentError, "from 1", {"images": ONE, "segment_ids": torch.tensor([[-1, 1, 1, 1], [1, 1, 1, 1]])}),
    (SegmentError, "cached", {"images": ONE, "segment_ids": torch.ones(2, 4), "use_cache": True}),
    (CacheError, "MQWenCache, not tuple", {"images": ONE, "past_key_values": ()}),
    (TypeError, "does not take inputs_embeds", {"images": ONE, "inputs_embeds": ONE}),
    (ValueError, "'last'", {"images": ONE, "logits_to_keep": "last"}),
]


@pytest.mark.parametrize("case", range(len(FORWARD)))
def test_forward(case: int) -> None:
    error, message, arguments = FORWARD[case]
    with pytest.raises(error, match=message):
        small_model()(**{"input_ids": IDS, **arguments})


CONFIGURATIONS = [
    ("kv_channels", {"kv_channels": 64}),
    ("image_token_id 151646", {"vocab_size": 1000}),
    ("tie_word_embeddings", {"tie_word_embeddings": True}),
    ("dropout", {"attn_dropout_prob": 0.1}),
    ("even", {"intermediate_size": 333}),
    ("newer", {"format_version": 99}),
    ("image_std", {"image_std": [1.0, 0.0, 1.0]}),
    ("patch_size 15", {"vision_config": {"image_size": 224, "patch_size": 15}}),
    ("rotary_pct", {"rotary_pct": 0.01}),
    ("seq_length", {"seq_length": 0}),
    ("vocab_size.*expected int, got str", {"vocab_size": "many"}),
    ("vocab_size.*expected int, got NoneType", {"vocab_size": None}),
    ("hidden_size.*expected int, got float", {"hidden_size": 1e9}),
    ("hidden_size must be 1 to 262,144, not 1000000000", {"hidden_size": 10**9}),
    ("num_hidden_layers must be 1 to 1,024, not 0", {"num_hidden_layers": 0}),
    ("rotary_emb_base.*expected float, got str", {"rotary_emb_base": "x"}),
    ("rotary_emb_base must be positive, not 0", {"rotary_emb_base": 0}),
    ("rotary_emb_base must be positive, not nan", {"rotary_emb_base": float("nan")}),
    ("layer_norm_epsilon must be positive, not -1e-06", {"layer_norm_epsilon": -1e-6}),
    ("dtype must be one of float32, bfloat16, float16, float64, not foo", {"dtype": "foo"}),
    ("dtype must be one of .*, not nn", {"dtype": "nn"}),
    ("image_mean.*NoneType", {"image_mean": None}),
    ("image_mean and image_std need three numbers", {"image_mean": ["a", "b", "c"]}),
    ("vision_config must hold", {"vision_config": []}),
    ("vision_config must hold", {"vision_config": {"model_type": "siglip_vision_model"}}),
    ("vision_config: Field 'patch_size'", {"vision_config": {"patch_size": "16"}}),
    ("vision_config: patch_size must be 1 to 8,192, not 0", {"vision_config": {"patch_size": 0}}),
    ("vision_config: hidden_act 'nope' is none of .*quick_gelu", {"vision_config": {"hidden_act": "nope"}}),
    ("vision_config: num_channels must be 3", {"vision_config": {"num_channels": 1}}),
    ("vision_config: .*multiple of the number of attention heads", {"vision_config": {"num_attention_heads": 7}}),
    ("vision_config: .*torch.* has no attribute 'foo'", {"vision_config": {"dtype": "foo"}}),
    ("rotary_dim", {"rotary_dim": 64}),
]
ODD = [None, True, 0, -1, 1.5, 1e9, 10**9, "x", "16", [], {}, float("nan"), float("inf"), ["a"] * 3, {"a": 1}]


@pytest.mark.parametrize(("message", "fields"), CONFIGURATIONS)
def test_configuration(message: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MQWenConfig(**fields)


def test_any_odd_value_of_any_field_is_refused_or_builds_a_network() -> None:
    """By ConfigurationError alone: what is accepted, the network is built from."""
    whole = small_model().config.to_dict()
    places: list[tuple[dict[str, Any], str, str]] = [(whole, name, "") for name in whole]
    places += [(whole["vision_config"], name, "vision_config") for name in whole["vision_config"]]
    accepted, refused = 0, 0
    for holder, name, where in places:
        good = holder[name]
        for value in ODD:
            holder[name] = value
            try:
                config = MQWenConfig(**deepcopy(whole))
            except ConfigurationError as error:
                refused += 1
                assert where in str(error)
            else:
                accepted += 1
                with torch.device("meta"):
                    MQWenLMHeadModel(config)
        holder[name] = good
    assert min(accepted, refused) > 100


def spoil_adapter(folder: Path, **change: Any) -> Path:
    """A PEFT adapter folder for the tiny model, with one thing changed."""
    get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["w1"])).save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    first = min(weights)
    if "rename" in change:
        weights[first.replace(*change["rename"])] = weights.pop(first)
    if "shape" in change:
        weights[first] = weights[first][:, :7].contiguous()
    save_file(weights, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change.get("config", {})))
    for name in change.get("remove", []):
        (folder / name).unlink()
    for name, content in change.get("write", {}).items():
        (folder / name).write_bytes(content)
    return folder


ADAPTERS: list[tuple[type[MQWenError], str, dict[str, Any]]] = [
    (AdapterError, "h.9.mlp.w1', which this model does not have", {"rename": ("h.0", "h.9")}),
    (AdapterError, "no LoRA weight", {"rename": (".lora_A", ".ia3_l")}),
    (AdapterError, "has 64 channels", {"shape": True}),
    (AdapterError, "do not agree", {"config": {"target_modules": ["w2"]}}),
    (AdapterError, "IA3", {"config": {"peft_type": "IA3"}}),
    (AdapterError, "list of module names", {"config": {"target_modules": "all-linear"}}),
    (AdapterError, "neither adapter_model.safetensors nor", {"remove": ["adapter_model.safetensors"]}),
    (CheckpointError, r"adapter_config\.json: is missing", {"remove": ["adapter_config.json"]}),
    (CheckpointError, "truncated", {"write": {"adapter_model.safetensors": b"1234567890"}}),
    (
        CheckpointError,
        "other_params.bin cannot be read",
        {"write": {"other_params.bin": b"cos\nsystem\n(S'x'\ntR."}},
    ),
]


@pytest.mark.parametrize("case", range(len(ADAPTERS)))
def test_adapter(case: int, tmp_path: Path) -> None:
    error, message, change = ADAPTERS[case]
    with pytest.raises(error, match=message):
        attach_adapter(tiny_model(), spoil_adapter(tmp_path, **change))


def test_a_projector_of_another_shape(tmp_path: Path) -> None:
    spoil_adapter(tmp_path)
    torch.save({"0.weight": torch.zeros(3, 3)}, tmp_path / "other_params.bin")
    with pytest.raises(AdapterError, match="other_params"):
        attach_adapter(tiny_model(), tmp_path)


def test_components_of_another_kind() -> None:
    qwen, clip, projector = (FIXTURES / name for name in ("tiny-qwen", "tiny-clip", "feature_proj.safetensors"))
    with pytest.raises(CheckpointError, match="not Qwen v1"):
        MQWenLMHeadModel.from_components(clip, clip, image_token_id=500)
    with pytest.raises(CheckpointError, match="not CLIP"):
        MQWenLMHeadModel.from_components(qwen, qwen, image_token_id=500)
    with pytest.raises(CheckpointError, match="does not exist"):
        MQWenLMHeadModel.from_components(qwen, clip, FIXTURES / "nothing.safetensors", image_token_id=500)
    with pytest.raises(CheckpointError, match=r"feature_proj\.text_projection\.weight is no parameter"):
        MQWenLMHeadModel.from_components(qwen, clip, clip / "model.safetensors", image_token_id=500)
    with pytest.raises(ConfigurationError, match="image_token_id 151646"):
        MQWenLMHeadModel.from_components(qwen, clip, projector)
