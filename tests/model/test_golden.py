"""The reference's recordings, case by case. Tolerances: 5e-5 up to seq_length, 2e-4 beyond; gradients 1e-4 relative."""

from __future__ import annotations

import pytest
import torch

from mqwen.model import MQWenLMHeadModel
from tests.model.golden import difference, names, scale, tiny_model, whole

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
