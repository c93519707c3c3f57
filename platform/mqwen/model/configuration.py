"""MQWenConfig: what must be known to build the network, in Qwen v1's words where it has them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from math import inf
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from mqwen.model.errors import ArtifactVersionError, ConfigurationError
from mqwen.model.picture import CLIP_MEAN, CLIP_STD, are_statistics

FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Far above any model: a slip of the pen must not be tried out.
LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "kv_channels": 1 << 12,
}
LARGEST_VISION = {
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "image_size": 1 << 13,
    "patch_size": 1 << 13,
}

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


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Odd values make transformers and huggingface_hub raise many kinds of errors; here they become one."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
        raise ConfigurationError(f"{where}{cause}") from error


def _with_own_errors(cls: type) -> type:
    """Lets a configuration raise ConfigurationError, whatever is wrong with its fields."""
    build: Callable[..., None] = cls.__init__  # type: ignore[misc]

    @wraps(build)
    def init(self: Any, **fields: Any) -> None:
        folder = fields.get("name_or_path")
        file = Path(folder) / "config.json" if folder else Path("config.json")
        version = fields.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:  # before its fields, which may be others
            raise ArtifactVersionError(
                file,
                f"format_version {version} was written by a newer mqwen; this one reads up to {FORMAT_VERSION}: update "
                "it",
            )
        with _explained(f"{file}: " if folder else ""):
            build(self, **fields)

    cls.__init__ = init  # type: ignore[misc]
    return cls


@_with_own_errors
@strict
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
        ConfigurationError: fields of another type, that contradict each other, or that this network does not compute.
        ArtifactVersionError: a newer format_version.
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
    layer_norm_epsilon: float | int = 1e-6
    initializer_range: float | int = 0.02
    rotary_pct: float | int = 1.0
    rotary_emb_base: float | int = 10000.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    vision_config: Any = None  # a CLIPVisionConfig, once built
    image_token_id: int = 151646
    image_mean: list | tuple = CLIP_MEAN
    image_std: list | tuple = CLIP_STD
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(**CLIP_VIT_L_14)
        elif isinstance(self.vision_config, dict):
            with _explained("vision_config: "):
                self.vision_config = CLIPVisionConfig(**self.vision_config)
        self._validate()
        self.image_mean, self.image_std = ([float(x) for x in values] for values in (self.image_mean, self.image_std))
        for name in ("attn_dropout_prob", "emb_dropout_prob"):
            if probability := kwargs.get(name):
                raise ConfigurationError(
                    f"{name}={probability}: dropout is not computed (published models have 0); set it to 0"
                )
        super().__post_init__(**kwargs)

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

        def require_sizes(config: PreTrainedConfig, limits: dict[str, int], where: str = "") -> None:
            for name, limit in limits.items():
                size = getattr(config, name)
                require(
                    isinstance(size, int) and 0 < size <= limit, f"{where}{name} must be 1 to {limit:,}, not {size!r}"
                )

        require_sizes(self, LARGEST)
        require(
            self.kv_channels * self.num_attention_heads == self.hidden_size,
            f"kv_channels ({self.kv_channels}) times num_attention_heads ({self.num_attention_heads}) must be "
            f"hidden_size ({self.hidden_size}): Qwen v1 splits its fused c_attn by hidden_size",
        )
        require(
            self.intermediate_size % 2 == 0,
            f"intermediate_size must be even (it counts both halves of the MLP), not {self.intermediate_size}",
        )
        require(
            0 < self.rotary_pct <= 1 and self.rotary_dim > 2 and self.rotary_dim % 2 == 0,
            f"kv_channels * rotary_pct must be an even number above 2, and no more than kv_channels: not "
            f"{self.kv_channels} * {self.rotary_pct}",
        )
        for name in ("rotary_emb_base", "layer_norm_epsilon"):
            require(0 < getattr(self, name) < inf, f"{name} must be positive, not {getattr(self, name)}")
        require(
            0 <= self.initializer_range < inf,
            f"initializer_range must not be negative, but is {self.initializer_range}",
        )
        require(self.seq_length > 1, f"seq_length must be at least 2, not {self.seq_length}")
        require(
            0 <= self.image_token_id < self.vocab_size,
            f"image_token_id {self.image_token_id} lies outside of the vocabulary of {self.vocab_size}",
        )
        require(not self.tie_word_embeddings, "tie_word_embeddings: Qwen v1 has a head of its own; set it to false")
        require(
            are_statistics(self.image_mean, self.image_std),
            f"image_mean and image_std need three numbers each, the latter positive: {self.image_mean}, "
            f"{self.image_std}",
        )
        vision = self.vision_config
        require(
            isinstance(vision, CLIPVisionConfig) and vision.model_type == CLIPVisionConfig.model_type,
            "vision_config must hold the fields of a CLIPVisionConfig, or one, not "
            f"{getattr(vision, 'model_type', type(vision).__name__)}",
        )
        for config, where in ((self, ""), (vision, "vision_config: ")):
            require(
                config.dtype is None or str(config.dtype).removeprefix("torch.") in DTYPES,
                f"{where}dtype must be one of {', '.join(DTYPES)}, not {config.dtype}",
            )
        require_sizes(vision, LARGEST_VISION, "vision_config: ")
        require(vision.num_channels == 3, f"vision_config: num_channels must be 3 (RGB), not {vision.num_channels}")
        require(
            vision.hidden_act in ACT2FN,
            f"vision_config: hidden_act {vision.hidden_act!r} is none of {', '.join(sorted(ACT2FN))}",
        )
        require(
            0 < vision.layer_norm_eps < inf,
            f"vision_config: layer_norm_eps must be positive, not {vision.layer_norm_eps}",
        )
        require(
            vision.image_size % vision.patch_size == 0,
            f"vision_config: image_size {vision.image_size} is no multiple of patch_size {vision.patch_size}",
        )
