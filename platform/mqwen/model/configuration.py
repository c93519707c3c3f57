"""MQWenConfig: what must be known to build the network, in Qwen v1's words where it has them."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CLIPVisionConfig, PreTrainedConfig

from mqwen.model.errors import ConfigurationError
from mqwen.model.picture import CLIP_MEAN, CLIP_STD

FORMAT_VERSION = 1

# CLIP-ViT-L/14, the vision tower of the published models.
CLIP_VIT_L_14: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}


class MQWenConfig(PreTrainedConfig):
    """Configuration of a Qwen v1 language model that reads pictures through a CLIP vision tower.

    The language fields are those of Qwen v1's config.json; the defaults are Qwen-1.8B's and CLIP-ViT-L/14's.

    Fields:
        intermediate_size: twice the width of the MLP (Qwen v1 counts both halves of its gated MLP).
        kv_channels: width of one attention head; kv_channels * num_attention_heads must be hidden_size.
        seq_length: positions the model was trained on. Beyond it, in eval mode, dynamic NTK and logn set in.
        max_position_embeddings: positions the model is said to serve; a limit for engines, not for the network.
        vision_config: a CLIPVisionConfig or its fields.
        image_token_id: the placeholder that stands for one picture (<|extra_0|> in Qwen's vocabulary).
        image_mean, image_std: statistics of RGB in 0..1, by which raw uint8 pictures are normalised.
        format_version: of the artifact; a newer one than this code knows is refused.

    Raises:
        ConfigurationError: fields that contradict each other, or that this network does not compute.
    """

    model_type = "mqwen"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": CLIPVisionConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 11008
    kv_channels: int = 128
    seq_length: int = 8192
    max_position_embeddings: int = 8192
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    rotary_pct: float = 1.0
    rotary_emb_base: float = 10000.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    vision_config: Any = None  # a CLIPVisionConfig, once built
    image_token_id: int = 151646
    image_mean: list[float] | tuple[float, ...] = CLIP_MEAN
    image_std: list[float] | tuple[float, ...] = CLIP_STD
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(**CLIP_VIT_L_14)
        elif isinstance(self.vision_config, dict):
            self.vision_config = CLIPVisionConfig(**self.vision_config)
        self.image_mean = [float(x) for x in self.image_mean]
        self.image_std = [float(x) for x in self.image_std]
        super().__post_init__(**kwargs)
        self._validate()

    @property
    def image_positions(self) -> int:
        """Positions that one picture takes in a row: the tower's patches, without its class token."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that are rotated."""
        return int(self.kv_channels * self.rotary_pct)

    def _validate(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise ConfigurationError(message)

        require(
            self.format_version <= FORMAT_VERSION,
            f"format_version {self.format_version} was written by a newer mqwen; this one reads up to {FORMAT_VERSION}",
        )
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_channels"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        require(
            self.kv_channels * self.num_attention_heads == self.hidden_size,
            f"kv_channels ({self.kv_channels}) times num_attention_heads ({self.num_attention_heads}) must be "
            f"hidden_size ({self.hidden_size}): Qwen v1 splits its fused c_attn by hidden_size",
        )
        require(
            self.intermediate_size > 0 and self.intermediate_size % 2 == 0,
            f"intermediate_size must be even (it counts both halves of the MLP), not {self.intermediate_size}",
        )
        require(
            self.rotary_dim > 2 and self.rotary_dim % 2 == 0,
            f"kv_channels * rotary_pct must be an even number above 2, not {self.kv_channels} * {self.rotary_pct}",
        )
        require(self.seq_length > 1, f"seq_length must be at least 2, not {self.seq_length}")
        require(
            0 <= self.image_token_id < self.vocab_size,
            f"image_token_id {self.image_token_id} lies outside of the vocabulary of {self.vocab_size}",
        )
        require(not self.tie_word_embeddings, "tie_word_embeddings: Qwen v1 has a head of its own; set it to false")
        for name in ("attn_dropout_prob", "emb_dropout_prob"):
            require(
                not getattr(self, name, 0.0),
                f"{name}={getattr(self, name, 0.0)}: dropout is not computed (published models have 0); set it to 0",
            )
        require(
            len(self.image_mean) == len(self.image_std) == 3 and all(x > 0 for x in self.image_std),
            f"image_mean and image_std need three numbers each, the latter positive: {self.image_mean}, "
            f"{self.image_std}",
        )
        vision = self.vision_config
        require(
            vision.image_size % vision.patch_size == 0,
            f"vision_config: image_size {vision.image_size} is no multiple of patch_size {vision.patch_size}",
        )
