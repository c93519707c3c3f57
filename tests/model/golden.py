"""The recorded reference, thinned: its tiny model, its inputs, and samples of its outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mqwen.model import MQWenLMHeadModel
from tests.model.thin_goldens import sample_places

FIXTURES = Path(__file__).parent / "fixtures"
IMAGE_TOKEN = 500
EOS = 499

_tensors = load_file(FIXTURES / "golden.safetensors")
_sampled = {name.split("@")[0]: name for name in _tensors}
META: dict[str, Any] = json.loads((FIXTURES / "golden.json").read_text())


def tiny_model(**options: Any) -> MQWenLMHeadModel:
    """The model that the reference was recorded with, in eval mode, float32."""
    return MQWenLMHeadModel.from_components(
        FIXTURES / "tiny-qwen",
        FIXTURES / "tiny-clip",
        FIXTURES / "feature_proj.safetensors",
        image_token_id=IMAGE_TOKEN,
        **options,
    )


def whole(name: str) -> torch.Tensor:
    """An input, or a small output, as recorded."""
    return _tensors[name].clone()


def names(prefix: str) -> list[str]:
    """All recorded names that begin so."""
    return [name for name in _sampled if name.startswith(prefix)]


def difference(name: str, computed: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """Largest absolute difference from the recording, over its sample; `where` (all axes but the last) selects."""
    stored = _sampled[name]
    expected = _tensors[stored]
    computed = computed.detach()
    if "@" not in stored:
        assert computed.shape == expected.shape, f"{name}: {tuple(computed.shape)} against {tuple(expected.shape)}"
        places = torch.arange(expected.numel())
    else:
        shape = tuple(map(int, stored.split("@")[1].split("x")))
        assert computed.shape == shape, f"{name}: {tuple(computed.shape)} against {shape}"
        places = sample_places(computed.numel(), len(expected))
    gaps = (computed.flatten()[places].float() - expected.flatten().float()).abs()
    if where is not None:
        gaps = gaps[where.flatten()[places // computed.shape[-1]]]
    assert len(gaps) > 10 or expected.numel() <= 10, f"{name}: too few places compared"
    return gaps.max().item()


def scale(name: str) -> float:
    """Largest recorded magnitude, for relative tolerances."""
    return _tensors[_sampled[name]].abs().max().item()
