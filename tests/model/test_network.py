"""The network's structure: published names and shapes, save and load, dtypes, gradients, and what is never computed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionModel

from mqwen.model import MQWenConfig, MQWenLMHeadModel
from mqwen.model.rotary import ntk_alpha, rotate
from tests.model.golden import FIXTURES, tiny_model, whole
from tests.model.small import PICTURE, POSITIONS, small_model

# Qwen v1's published configurations, by the fields that give shapes.
QWEN_1_8B = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 11008}
QWEN_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 22016}


def published_shapes(hidden: int, layers: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the checkpoints Qwen/Qwen-* and openai/clip-vit-large-patch14 (its vision tower)."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (151936, hidden),
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": (151936, hidden),
    }
    for n in range(layers):
        shapes |= {
            f"transformer.h.{n}.ln_1.weight": (hidden,),
            f"transformer.h.{n}.ln_2.weight": (hidden,),
            f"transformer.h.{n}.attn.c_attn.weight": (3 * hidden, hidden),
            f"transformer.h.{n}.attn.c_attn.bias": (3 * hidden,),
            f"transformer.h.{n}.attn.c_proj.weight": (hidden, hidden),
            f"transformer.h.{n}.mlp.w1.weight": (intermediate // 2, hidden),
            f"transformer.h.{n}.mlp.w2.weight": (intermediate // 2, hidden),
            f"transformer.h.{n}.mlp.c_proj.weight": (hidden, intermediate // 2),
        }
    clip: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1024,),
        "embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "embeddings.position_embedding.weight": (257, 1024),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for n in range(24):
        layer = f"encoder.layers.{n}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            clip |= {f"{layer}.self_attn.{part}.weight": (1024, 1024), f"{layer}.self_attn.{part}.bias": (1024,)}
        clip |= {f"{layer}.mlp.fc1.weight": (4096, 1024), f"{layer}.mlp.fc1.bias": (4096,)}
        clip |= {f"{layer}.mlp.fc2.weight": (1024, 4096), f"{layer}.mlp.fc2.bias": (1024,)}
    for norm in norms:
        clip |= {f"{norm}.weight": (1024,), f"{norm}.bias": (1024,)}
    shapes |= {f"visual.vision_model.{name}": shape for name, shape in clip.items()}
    projector = {"0.weight": (hidden, 1024), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    return shapes | {f"feature_proj.{name}": shape for name, shape in projector.items()}


@pytest.mark.parametrize(
    ("fields", "language_parameters"), [(QWEN_1_8B, 1_836_828_672), (QWEN_7B, 7_721_324_544)], ids=["1.8B", "7B"]
)
def test_full_size_has_the_published_names_and_shapes(fields: dict[str, int], language_parameters: int) -> None:
    config = MQWenConfig(**fields)
    assert config.image_positions == 256
    with torch.device("meta"):
        model = MQWenLMHeadModel(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == published_shapes(fields["hidden_size"], fields["num_hidden_layers"], fields["intermediate_size"])
    assert shapes.keys() == model.state_dict().keys(), "buffers would be in no published checkpoint"
    counts = {
        part: sum(p.numel() for name, p in model.named_parameters() if name.startswith(part))
        for part in ("transformer", "lm_head", "visual")
    }
    assert counts["transformer"] + counts["lm_head"] == language_parameters
    assert counts["visual"] == 303_179_776


def test_save_and_load(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "mqwen" and config["format_version"] == 1
    assert config["seq_length"] == 128 and config["image_token_id"] == 500
    loaded = MQWenLMHeadModel.from_pretrained(tmp_path)
    assert not loaded.training
    for (name, ours), (other, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(ours, theirs)
    half = MQWenLMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_fresh_projector() -> None:
    torch.manual_seed(0)
    model = MQWenLMHeadModel.from_components(FIXTURES / "tiny-qwen", FIXTURES / "tiny-clip", image_token_id=500)
    assert abs(model.feature_proj[0].weight.std() - 0.01) < 0.001 and not model.feature_proj[0].bias.any()


def test_vision_tower_is_clips(tmp_path: Path) -> None:
    """Against transformers' own loading of the CLIP folder; class token cut, last layer, no post_layernorm."""
    pictures = whole("c4_decode_batch.pixel_values")
    clip = CLIPVisionModel.from_pretrained(FIXTURES / "tiny-clip")
    with torch.no_grad():
        expected = clip(pictures).last_hidden_state[:, 1:]
        assert torch.equal(tiny_model().visual(pictures), expected)


@torch.no_grad()
def test_raw_pictures_are_normalised() -> None:
    model = small_model()
    raw = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.config.image_mean, model.config.image_std))
    assert torch.allclose(model.encode_images(raw), model.encode_images((raw / 255 - mean) / std), atol=1e-6)


def test_a_fresh_model_starts_where_the_configuration_says() -> None:
    torch.manual_seed(0)
    config = MQWenConfig(
        **(small_model().config.to_dict() | {"vocab_size": 5000, "hidden_size": 128, "kv_channels": 64})
    )
    model = MQWenLMHeadModel(config)
    assert abs(model.transformer.wte.weight.std() - 0.2) < 0.002
    assert abs(model.transformer.h[0].attn.c_proj.weight.std() - 0.2 / 4**0.5) < 0.005
    assert abs(model.feature_proj[2].weight.std() - 0.01) < 0.001
    clip = CLIPVisionModel(config.vision_config)
    for ours, theirs in zip(model.visual.vision_model.parameters(), clip.parameters(), strict=True):
        if ours.numel() >= 256:
            assert abs(ours.std() - theirs.std()) <= 0.2 * theirs.std(), "CLIP's own initial values"
    assert not model.feature_proj[0].bias.any() and (model.transformer.ln_f.weight == 1).all()


def test_no_pictures_keep_the_picture_path_in_the_graph() -> None:
    """Every rank of a sharded model must compute the same gradients' names, those of the tower too."""
    model = MQWenLMHeadModel(small_model().config).train()
    ids = torch.tensor([[1, 2, 3, 4]])
    blank = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    loss = model(ids, pixel_values=blank, labels=ids).loss
    assert torch.equal(loss, model(ids, labels=ids).loss)
    loss.backward()
    for name, parameter in model.named_parameters():
        if "post_layernorm" not in name:  # only CLIP's pooled output goes through it
            assert parameter.grad is not None, name
            assert parameter.grad.any() == (not name.startswith(("visual", "feature_proj"))), name


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny_model().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        images, labels = whole("c2_image.images_fp16"), whole("c2_image.labels")
        model(whole("c2_image.input_ids"), pixel_values=images, labels=labels).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 60
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("labels", [[[-100] * 6], [[1]]], ids=["none", "one place"])
def test_a_loss_without_labels_is_zero(labels: list[list[int]]) -> None:
    """Not NaN: a rank of a sharded step may hold no label. The head still gets its (zero) gradient."""
    model = MQWenLMHeadModel(small_model().config).train()
    given = torch.tensor(labels)
    for keep in (0, "labels"):
        loss = model(given.clamp(min=1), labels=given, logits_to_keep=keep).loss
        assert loss == 0
        loss.backward()
    assert model.lm_head.weight.grad is not None and not model.lm_head.weight.grad.any()


def test_labelled_loss_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More labelled positions than fit a chunk: the same loss and gradients as from all logits at once."""
    monkeypatch.setattr("mqwen.model.loss.CHUNK", 7)
    ids, results = torch.randint(0, PICTURE, (3, 20), generator=torch.Generator().manual_seed(0)), []
    for keep in (0, "labels"):
        model = small_model()
        model.zero_grad()
        loss = model(ids, labels=torch.where(ids % 3 == 0, -100, ids), logits_to_keep=keep).loss
        loss.backward()
        results.append([loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@torch.no_grad()
def test_logits_to_keep() -> None:
    model, ids = small_model(), torch.tensor([[1, 2, 3, 4, 5]])
    full = model(ids).logits
    assert torch.allclose(model(ids, logits_to_keep=2).logits, full[:, -2:], atol=1e-6)
    assert torch.allclose(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, full[:, [0, 3]], atol=1e-6)
    plain = model(ids, return_dict=False, use_cache=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], full)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("rows", ["plain", "right-padded", "left-padded", "packed", "packed, expanded"])
def test_no_mask_of_positions_by_positions(rows: str) -> None:
    """Forward and backward of a long row make nothing with T * T elements, nor logits where no label stands."""
    length = 2048
    ids = torch.zeros(1, length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    labels[:, 7::100] = 5
    places = torch.arange(length).unsqueeze(0)
    given: dict[str, Any] = {
        "plain": {},
        "right-padded": {"attention_mask": (places < 2000).long()},
        "left-padded": {"attention_mask": (places >= 48).long()},
        "packed": {"segment_ids": places // 300 + 1},
        "packed, expanded": {"segment_ids": places // 300 + 1},
    }[rows]
    images = None
    if "expanded" in rows:
        ids[0, 5::400] = PICTURE
        images = torch.randn(int((ids == PICTURE).sum()), POSITIONS, 32)
    with Largest() as seen:
        small_model()(ids, images=images, labels=labels, logits_to_keep="labels", **given).loss.backward()
    assert seen.elements <= 4 * length * 32 < length * length / 8


def test_blocks_compile_whole_and_once_for_all_lengths() -> None:
    """No graph break, and no new graph for each length of row: the second one is for any length."""
    model = MQWenLMHeadModel(small_model().config).train()
    ids = torch.randint(0, PICTURE, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = [model(ids[:, :length]).logits for length in (20, 17, 13, 11)]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for block in model.transformer.h:
        block.compile(backend="eager", fullgraph=True)
    for logits in expected:
        assert torch.allclose(model(ids[:, : logits.shape[1]]).logits, logits, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


@torch.no_grad()
def test_partial_rotary_passes_the_rest() -> None:
    x = torch.randn(1, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])[None, :, None]
    turned = rotate(x, angles.cos(), angles.sin())
    assert torch.equal(turned[..., 4:], x[..., 4:])
    pairs = torch.complex(x[..., :2], x[..., 2:4]) * torch.exp(1j * angles)
    assert torch.allclose(turned[..., :2], pairs.real, atol=1e-6)
    assert torch.allclose(turned[..., 2:4], pairs.imag, atol=1e-6)


@pytest.mark.parametrize("seq_length", [128, 1000, 8192])
def test_ntk_alpha_against_its_formula(seq_length: int) -> None:
    lengths = [
        1,
        seq_length - 1,
        seq_length,
        seq_length + 1,
        2 * seq_length,
        2 * seq_length + 1,
        4 * seq_length,
        9 * seq_length,
    ]
    expected = [max(1.0, 2.0 ** math.ceil(math.log2(n / seq_length) + 1) - 1) for n in lengths]
    assert ntk_alpha(torch.tensor(lengths), seq_length).tolist() == expected
