"""The reference's recordings, case by case. Tolerances: 5e-5 up to seq_length, 2e-4 beyond; gradients 1e-4 relative."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from mqwen.model import MQWenLMHeadModel
from mqwen.model.adapters import attach_adapter
from mqwen.model.generation import StopWordsLogitsProcessor
from mqwen.model.rotary import ntk_alpha, rotary_tables
from tests.model.golden import EOS, FIXTURES, META, difference, names, scale, tiny_model, whole

ATOL = 5e-5


@pytest.fixture(scope="module")
def model() -> MQWenLMHeadModel:
    return tiny_model()


@torch.no_grad()
def test_c1_text(model: MQWenLMHeadModel) -> None:
    out = model(whole("c1_text.input_ids"), labels=whole("c1_text.labels"), use_cache=True, output_hidden_states=True)
    assert difference("c1_text.logits", out.logits) <= ATOL
    assert difference("c1_text.loss", out.loss) <= ATOL
    for index, state in enumerate(out.hidden_states):
        assert difference(f"c1_text.hidden_states.{index}", state) <= ATOL
    for index, layer in enumerate(out.past_key_values.layers):
        assert difference(f"c1_text.past_key_values.{index}.key", layer.keys.transpose(1, 2)) <= ATOL
        assert difference(f"c1_text.past_key_values.{index}.value", layer.values.transpose(1, 2)) <= ATOL


@torch.no_grad()
def test_c2_image(model: MQWenLMHeadModel) -> None:
    ids, labels, pictures = (whole(f"c2_image.{name}") for name in ("input_ids", "labels", "images_fp16"))
    features = model.encode_images(pictures)
    assert difference("c2_image.projected", features) <= ATOL
    for arguments in ({"pixel_values": pictures}, {"images": features}):
        out = model(ids, labels=labels, output_hidden_states=True, **arguments)
        assert difference("c2_image.logits", out.logits) <= ATOL
        assert difference("c2_image.loss", out.loss) <= ATOL
        for index, state in enumerate(out.hidden_states):
            assert difference(f"c2_image.hidden_states.{index}", state) <= ATOL


@torch.no_grad()
@pytest.mark.parametrize("case", ["c4_decode", "c4_decode_batch", "c4_decode_text"])
def test_c4_decode(model: MQWenLMHeadModel, case: str) -> None:
    pictures = None if case == "c4_decode_text" else whole(f"{case}.pixel_values")
    out = model(whole(f"{case}.input_ids"), pixel_values=pictures, use_cache=True)
    assert difference(f"{case}.prefill_logits", out.logits) <= ATOL
    cache, steps, chosen = out.past_key_values, [], [out.logits[:, -1].argmax(-1)]
    for token in whole(f"{case}.greedy_tokens").unbind(1):
        steps.append(model(token.unsqueeze(1), past_key_values=cache).logits)
        chosen.append(steps[-1][:, -1].argmax(-1))
    assert torch.equal(torch.stack(chosen[:-1], 1), whole(f"{case}.greedy_tokens"))
    assert difference(f"{case}.step_logits", torch.cat(steps, 1)) <= ATOL
    if case == "c4_decode":
        for index, layer in enumerate(cache.layers):
            assert difference(f"c4_decode.final_past.{index}.key", layer.keys.transpose(1, 2)) <= ATOL
            assert difference(f"c4_decode.final_past.{index}.value", layer.values.transpose(1, 2)) <= ATOL


@torch.no_grad()
def test_c3_mask(model: MQWenLMHeadModel) -> None:
    mask = whole("c3_mask.attention_mask")
    out = model(whole("c3_mask.input_ids"), attention_mask=mask, output_hidden_states=True)
    assert difference("c3_mask.logits", out.logits, mask > 0) <= ATOL
    for index, state in enumerate(out.hidden_states):
        assert difference(f"c3_mask.hidden_states.{index}", state, mask > 0) <= ATOL


@torch.no_grad()
def test_c3_mask_image(model: MQWenLMHeadModel) -> None:
    ids, labels, pictures = (whole(f"c2_image.{name}") for name in ("input_ids", "labels", "images_fp16"))
    mask = whole("c3_mask_image.attention_mask")
    out = model(ids, pixel_values=pictures, attention_mask=mask, labels=labels)
    assert difference("c3_mask_image.logits", out.logits, mask > 0) <= ATOL
    assert difference("c3_mask_image.loss", out.loss) <= ATOL


@torch.no_grad()
def test_c3_mask_long(model: MQWenLMHeadModel) -> None:
    """Row 0 is recorded right. Row 1 is left-padded beyond seq_length, where the reference scales queries by their
    padded position: ours must equal the row alone instead."""
    ids, mask = whole("c3_mask_long.input_ids"), whole("c3_mask_long.attention_mask")
    logits = model(ids, attention_mask=mask).logits
    first = torch.zeros_like(mask, dtype=torch.bool)
    first[0] = True
    assert difference("c3_mask_long.logits", logits, first) <= 2e-4
    alone = model(ids[1:, mask[1] > 0]).logits
    assert (logits[1, mask[1] > 0] - alone[0]).abs().max() <= ATOL
    assert difference("c3_mask_long.logits", logits, ~first & (mask > 0)) > 0.05, "the recorded fault is gone?"


@torch.no_grad()
@pytest.mark.parametrize("case", ["c5a_long", "c5e_longer", "c5f_exact", "c5g_plus1"])
def test_c5_long_prefill(model: MQWenLMHeadModel, case: str) -> None:
    out = model(whole(f"{case}.input_ids"), output_hidden_states=True)
    assert difference(f"{case}.logits", out.logits) <= 2e-4
    if case == "c5a_long":
        for index, state in enumerate(out.hidden_states):
            assert difference(f"{case}.hidden_states.{index}", state) <= 2e-4


def test_c5a_rotary_tables() -> None:
    alpha = ntk_alpha(torch.tensor([[200]]), 128)
    assert alpha.item() == 3.0
    cos, sin = rotary_tables(torch.arange(200).unsqueeze(0), alpha, 16, 10000.0)
    for name, table in (("cos", cos), ("sin", sin)):
        assert difference(f"c5a_long.rotary_{name}", torch.cat((table, table), -1).unsqueeze(2)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("case", ["c5b_long_decode", "c5c_cross_decode", "c5h_double_cross"])
def test_c5_decode_keeps_the_alpha_of_its_prefill(model: MQWenLMHeadModel, case: str) -> None:
    """b: α 3 throughout. c: 120 positions in, α stays 1 beyond 128. h: 256 in, α stays 3 beyond 256."""
    ids = whole(f"{case}.input_ids")
    prefill = {"c5b_long_decode": 200, "c5c_cross_decode": 120, "c5h_double_cross": 256}[case]
    out = model(ids[:, :prefill], use_cache=True)
    if case != "c5h_double_cross":
        assert difference(f"{case}.prefill_logits_last", out.logits[:, -1]) <= 2e-4
    fed = whole(f"{case}.greedy_tokens") if case == "c5b_long_decode" else ids[:, prefill:]
    steps = [model(token.unsqueeze(1), past_key_values=out.past_key_values).logits for token in fed.unbind(1)]
    assert difference(f"{case}.step_logits", torch.cat(steps, 1)) <= 2e-4
    if case == "c5c_cross_decode":
        assert difference(f"{case}.full_forward_logits", model(ids).logits) <= 2e-4


@torch.no_grad()
def test_c5d_train_mode() -> None:
    assert difference("c5d_train_mode.logits", tiny_model().train()(whole("c5a_long.input_ids")).logits) <= 2e-4


@torch.no_grad()
def test_c5i_long_image(model: MQWenLMHeadModel) -> None:
    features = model.encode_images(whole("c4_decode.pixel_values"))
    assert difference("c5i_long_image.projected", features) <= ATOL
    out = model(whole("c5i_long_image.input_ids"), images=features)
    assert difference("c5i_long_image.logits", out.logits) <= 2e-4


def test_c6_grads() -> None:
    model = tiny_model()
    labels, pictures = whole("c2_image.labels"), whole("c2_image.images_fp16")
    loss = model(whole("c2_image.input_ids"), pixel_values=pictures, labels=labels).loss
    loss.backward()
    assert difference("c6_grads.loss", loss) <= ATOL
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    recorded = names("c6_grads.grad.")
    assert len(recorded) == 14
    for name in recorded:
        ours = gradients[name.removeprefix("c6_grads.grad.").removeprefix("LLM.")]
        assert difference(name, ours) <= 1e-4 * scale(name), name
    assert not gradients["transformer.wte.weight"][500].any(), "the placeholder's own embedding is not used"


def test_c7_lora(reference_adapter: Path) -> None:
    """Adapter and projector as the reference saved them; gradients relative 1e-4, merged weights 1e-5."""
    model = tiny_model()
    wrapped = attach_adapter(model, reference_adapter, trainable=True)
    model.feature_proj.requires_grad_(True)
    ids, labels, pictures = (whole(f"c2_image.{name}") for name in ("input_ids", "labels", "images_fp16"))
    out = wrapped(input_ids=ids, pixel_values=pictures, labels=labels)
    assert difference("c7_lora.logits", out.logits) <= ATOL
    assert difference("c7_lora.loss", out.loss) <= ATOL
    out.loss.backward()
    gradients = {f"LLM.{name}": parameter.grad for name, parameter in wrapped.named_parameters()}
    gradients |= {f"feature_proj.{name}": parameter.grad for name, parameter in model.feature_proj.named_parameters()}
    recorded = names("c7_lora.grad.")
    assert len(recorded) == 22
    for name in recorded:
        assert difference(name, gradients[name.removeprefix("c7_lora.grad.")]) <= 1e-4 * scale(name), name

    original = tiny_model().transformer.h[0].attn.c_attn.weight
    layer = model.transformer.h[0].attn.c_attn
    wrapped.merge_adapter()
    assert difference("c7_lora.merged.transformer.h.0.attn.c_attn.weight", layer.weight) <= 1e-5
    with torch.no_grad():
        assert difference("c7_lora.logits", model(ids, pixel_values=pictures).logits) <= ATOL
    wrapped.unmerge_adapter()
    assert (layer.weight - original).abs().max() <= 1e-6


def test_c8_trainer(reference_adapter: Path) -> None:
    """Four steps of the reference's trainer, by a plain loop. Tolerances: the log's four decimals of the loss 1e-4, the
    gradient's norm 1e-4 of itself, the weights 5e-5, where one step moves them by up to 5e-3."""
    recorded = META["c8_trainer"]
    model = tiny_model()
    wrapped = attach_adapter(model, reference_adapter, trainable=True).train()
    model.feature_proj.requires_grad_(True)
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(("feature_proj" in name, "bias" in name), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr": 5e-3 if projector else 1e-3, "weight_decay": 0.0 if bias else 0.01}
            for (projector, bias), parameters in groups.items()
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    trained = [parameter for parameters in groups.values() for parameter in parameters]
    pictures = whole("c8_trainer.images_raw")
    for order, log in zip(recorded["order"], recorded["log"], strict=False):
        examples = [recorded["examples"][index] for index in order]
        width = max(len(ids) for ids, _ in examples) + 1
        rows = [ids + [EOS] * (width - len(ids)) for ids, _ in examples]
        labels = [[-100] * (len(i) - n) + i[-n:] + [EOS] + [-100] * (width - 1 - len(i)) for i, n in examples]
        out = wrapped(input_ids=torch.tensor(rows), pixel_values=pictures[order], labels=torch.tensor(labels))
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, recorded["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert abs(out.loss.item() - log["loss"]) <= 1e-4
        assert abs(norm.item() - log["grad_norm"]) <= 1e-4 * log["grad_norm"]
    after = {f"LLM.{name}": parameter for name, parameter in wrapped.named_parameters()}
    after |= {f"feature_proj.{name}": parameter for name, parameter in model.feature_proj.named_parameters()}
    weights = names("c8_trainer.after.")
    assert len(weights) == 22
    for name in weights:
        assert difference(name, after[name.removeprefix("c8_trainer.after.")]) <= ATOL, name


@torch.no_grad()
def test_c9_bf16() -> None:
    """bfloat16 throughout but for rotary tables and loss. Kernels round differently: 0.05 on logits of up to 6, where
    bfloat16 and float32 differ by 0.08; beyond seq_length 0.1. The loss is ours in float32, the reference's is not."""
    model = tiny_model(dtype=torch.bfloat16)
    ids, labels, pictures = (whole(f"c2_image.{name}") for name in ("input_ids", "labels", "images_fp16"))
    out = model(ids, pixel_values=pictures, labels=labels)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert difference("c9_bf16.logits", out.logits) <= 0.05
    assert difference("c9_bf16.loss", out.loss) <= 0.05
    assert difference("c9_bf16.logits_long", model(whole("c5a_long.input_ids")).logits) <= 0.1


@torch.no_grad()
def test_c10_generation(model: MQWenLMHeadModel) -> None:
    """Greedy with repetition penalty and stop words through generate; the processors' scores as recorded."""
    recorded = META["c10_generation"]
    ids = torch.tensor([recorded["input_ids"]])
    assert torch.equal(ids, whole("c4_decode.input_ids"))

    def generate(**options: Any) -> list[int]:
        pictures = whole("c4_decode.pixel_values")
        options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": EOS, "eos_token_id": EOS} | options
        return model.generate(ids, pixel_values=pictures, **options)[0, ids.shape[1] :].tolist()

    assert generate() == recorded["greedy"]
    assert generate(repetition_penalty=1.1) == recorded["repetition_penalty_1_1"]
    assert generate(repetition_penalty=3.0) == recorded["repetition_penalty_3_0"]
    for case in ("stop_word_single", "stop_word_pair"):
        stop = StopWordsLogitsProcessor(recorded[case]["stop"], EOS, prompt_length=ids.shape[1])
        assert generate(logits_processor=[stop]) == recorded[case]["out"]

    scores = whole("c10_generation.input_scores")
    for penalty in (1.1, 3.0):
        penalised = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores.clone())
        assert difference(f"c10_generation.rep_{penalty}_scores", penalised) <= 1e-6
    for top_p in (0.5, 0.8):
        probabilities = TopPLogitsWarper(top_p)(ids, scores.clone()).softmax(-1)
        assert difference(f"c10_generation.top_p_{top_p}_probs", probabilities) <= 1e-6


@pytest.fixture
def reference_adapter(tmp_path: Path) -> Path:
    """The reference's adapter folder: the pickled files are made here, as nothing pickled is checked in."""
    prefix = "c7_lora.adapter."
    adapter = {name.removeprefix(prefix): whole(name) for name in names(prefix)}
    assert len(adapter) == 18
    torch.save(adapter, tmp_path / "adapter_model.bin")
    torch.save(load_file(FIXTURES / "feature_proj.safetensors"), tmp_path / "other_params.bin")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny-qwen", "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | META["c7_lora"]["settings"]))
    return tmp_path
