"""LoRA adapters as PEFT writes them now; the reference's are golden case c7."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mqwen.model import MQWenLMHeadModel
from mqwen.model.adapters import attach_adapter, read_adapter
from mqwen.model.errors import AdapterError
from tests.model.golden import FIXTURES, IMAGE_TOKEN, tiny_model, whole

TARGETS = ["c_attn", "w1", "w2"]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        pictures = whole("c2_image.images_fp16")
        return model(input_ids=whole("c2_image.input_ids"), pixel_values=pictures, use_cache=False).logits


@pytest.fixture(params=[None, ["feature_proj"]], ids=["LoRA only", "with the projector"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A PEFT folder with weights that matter, and the logits of the model that saved it."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=request.param, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
                assert "lora_" in name or "feature_proj" in name
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    return tmp_path, logits(model)


def test_a_peft_folder_attaches_merges_and_unmerges(trained: tuple[Path, torch.Tensor]) -> None:
    folder, expected = trained
    model = tiny_model()
    plain = logits(model)
    wrapped = attach_adapter(model, folder)
    assert not any(parameter.requires_grad for parameter in wrapped.parameters())
    assert torch.allclose(logits(wrapped), expected, atol=1e-6) and not torch.allclose(plain, expected, atol=0.1)
    wrapped.merge_adapter()
    assert torch.allclose(logits(wrapped), expected, atol=1e-4)
    wrapped.unmerge_adapter()
    assert torch.allclose(logits(wrapped), expected, atol=1e-4)
    with wrapped.disable_adapter():
        assert torch.allclose(logits(wrapped), plain, atol=1e-4)


def test_from_components_merges_for_good(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, expected = trained
    model = MQWenLMHeadModel.from_components(
        FIXTURES / "tiny-qwen",
        FIXTURES / "tiny-clip",
        FIXTURES / "feature_proj.safetensors",
        adapter=folder,
        image_token_id=IMAGE_TOKEN,
    )
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert list(dict(model.named_parameters())) == list(dict(tiny_model().named_parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "artifact")
    assert torch.equal(logits(MQWenLMHeadModel.from_pretrained(tmp_path / "artifact")), logits(model))


def test_a_trainable_adapter_leaves_the_rest_frozen(trained: tuple[Path, torch.Tensor]) -> None:
    wrapped = attach_adapter(tiny_model().train(), trained[0], trainable=True)
    learning = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert len([name for name in learning if "lora_" in name]) == 2 * 3 * len(TARGETS)
    assert all("lora_" in name or "modules_to_save" in name for name in learning)
    assert wrapped.training


@pytest.mark.parametrize("bias", ["none", "all"])
def test_an_adapter_that_would_change_the_model_itself_is_refused(
    trained: tuple[Path, torch.Tensor], bias: str
) -> None:
    folder, _ = trained
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if bias == "none":
        file = folder / "adapter_model.safetensors"
        weight = torch.zeros_like(model.transformer.ln_f.weight)
        save_file(load_file(file) | {"base_model.model.transformer.ln_f.weight": weight}, file)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bias": bias}))
    with pytest.raises(AdapterError, match="modules_to_save names" if bias == "none" else "bias is 'all'"):
        read_adapter(model, folder)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
