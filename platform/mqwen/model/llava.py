"""Export as `LlavaForConditionalGeneration`, which vLLM, SGLang and transformers serve without code of ours.

Up to seq_length Qwen v1 computes what Qwen2 computes, under other names, so nothing is lost: the fused c_attn is cut
into q, k and v, Qwen's w2 is the gate and w1 the way up. Beyond seq_length Qwen v1 stretches its positions (dynamic
NTK, logn) and Qwen2 does not: the exported max_position_embeddings ends there.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import GenerationConfig, LlavaConfig, Qwen2Config

from mqwen.model.artifact import check_processor
from mqwen.model.configuration import MQWenConfig
from mqwen.model.errors import ConfigurationError
from mqwen.model.network import MQWenLMHeadModel
from mqwen.model.processor import MQWenProcessor

# The classic names, which vLLM wants and transformers still reads; what transformers 5 writes by itself vLLM refuses.
_PREFIXES = {
    "visual.vision_model.": "vision_tower.vision_model.",
    "feature_proj.0.": "multi_modal_projector.linear_1.",
    "feature_proj.2.": "multi_modal_projector.linear_2.",
    "transformer.wte.": "language_model.model.embed_tokens.",
    "transformer.ln_f.": "language_model.model.norm.",
    "lm_head.": "language_model.lm_head.",
}
_IN_BLOCK = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def export_llava(
    model: MQWenLMHeadModel, processor: MQWenProcessor, directory: str | Path, *, max_shard_size: str = "5GB"
) -> None:
    """Writes config, weights (safetensors), fast tokenizer, processor and chat template into a folder.

    Args:
        model: on any device, of any dtype, which the files keep. An adapter must be merged before.
        directory: made if missing; an earlier export in it is replaced.

    Raises:
        ConfigurationError: a model that Qwen2 cannot express, or a processor that is not this model's.
    """
    directory = Path(directory)
    _check(model.config)
    check_processor(model.config, processor)
    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(dict(_weights(model)), directory, max_shard_size=max_shard_size)

    tokenizer = processor.tokenizer
    ends = {"eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.eod_id}
    GenerationConfig.from_dict(model.generation_config.to_diff_dict() | ends).save_pretrained(directory)
    processor.save_pretrained(directory)
    tokenizer.save_fast(directory)  # over the files that name our class
    vision = model.config.vision_config
    settings = {
        "processor_class": "LlavaProcessor",
        "image_token": tokenizer.image_token,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": 1,  # CLIP's class token, which the strategy "default" takes off again
        "vision_feature_select_strategy": "default",
    }
    (directory / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    llava_config(model.config, tokenizer.eod_id, str(model.dtype).removeprefix("torch.")).save_pretrained(directory)


def _check(config: MQWenConfig) -> None:
    if config.rotary_pct != 1.0:
        raise ConfigurationError(f"rotary_pct {config.rotary_pct}: Qwen2 rotates whole heads, so only 1.0 exports")


def _weights(model: MQWenLMHeadModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if name.startswith("transformer.h."):
            layer, rest = name.removeprefix("transformer.h.").split(".", 1)
            part, kind = rest.rsplit(".", 1)
            block = f"language_model.model.layers.{layer}"
            if part == "attn.c_attn":
                for projection, third in zip("qkv", tensor.chunk(3), strict=True):
                    # clone: the thirds share one storage, which safetensors refuses
                    yield f"{block}.self_attn.{projection}_proj.{kind}", third.clone()
            else:
                yield f"{block}.{_IN_BLOCK[part]}.{kind}", tensor
        else:
            prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
            yield _PREFIXES[prefix] + name.removeprefix(prefix), tensor


def llava_config(config: MQWenConfig, eod_id: int, dtype: str) -> LlavaConfig:
    text = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size // 2,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        max_position_embeddings=config.seq_length,
        rms_norm_eps=config.layer_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.rotary_emb_base)},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eod_id,
        pad_token_id=eod_id,
        dtype=dtype,
    )
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        text_config=text,
        vision_config=config.vision_config.to_dict(),
        image_token_index=config.image_token_id,
        image_seq_length=config.image_positions,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        tie_word_embeddings=False,
        dtype=dtype,
    )
