"""What transformers' generate needs to know of pictures and of our cache; and stop words of several tokens.

Single stop tokens need only `eos_token_id=[...]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor

from mqwen.model.cache import MQWenCache
from mqwen.model.errors import GenerationError, PictureCountError

FORCED = 2.0**15  # the score by which Qwen v1 makes the end certain


class StopWordsLogitsProcessor(LogitsProcessor):
    """Force the end token on the step after a stop word; the stop word itself stays in the output.

    Args:
        stop_words: token ids of each stop word.
        eos_token_id: the token to force.
        prompt_length: ids of the prompt; a stop word counts only where it was generated. 0 looks at the prompt too.
    """

    def __init__(self, stop_words: Sequence[Sequence[int]], eos_token_id: int, prompt_length: int = 0) -> None:
        if not all(stop_words):
            raise ValueError("a stop word needs at least one token")
        self.stop_words = [list(word) for word in stop_words]
        self.eos_token_id = eos_token_id
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) for the ids (B, T) so far, with the end forced in rows that end in a stop word."""
        generated = input_ids[:, self.prompt_length :]
        for word in self.stop_words:
            if generated.shape[1] >= len(word):
                ended = (generated[:, -len(word) :] == generated.new_tensor(word)).all(1)
                scores = scores.clone()
                scores[ended, self.eos_token_id] = FORCED
        return scores


class PictureGenerationMixin(GenerationMixin):
    """transformers' generation loop for a model with `encode_images`, fed with pictures and kept in an MQWenCache.

    As for every model of transformers, and in Qwen v1 itself, no length is refused: past seq_length dynamic NTK and
    logn set in, and past max_position_embeddings transformers warns (it counts ids, a picture as one). An engine that
    must bound its memory refuses such requests itself.
    """

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: MQWenCache | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = True,
        images: Tensor | None = None,
        pixel_values: Tensor | None = None,
        logits_to_keep: int = 1,
        **unused: Any,
    ) -> dict[str, Any]:
        """One step of transformers' generate: pictures go in with the prompt, afterwards only the new ids.

        Given a cache of earlier turns, input_ids are the whole conversation (or the new turn alone), pictures those of
        the new turn only.
        """
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        with_pictures = is_first_iteration or not use_cache
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "images": images if with_pictures else None,
            "pixel_values": pixel_values if with_pictures else None,
            "logits_to_keep": logits_to_keep,
            "padding_side": "left",  # each row's last place must be its last token
        }

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give generate an MQWenCache instead of transformers' DynamicCache."""
        for name in ("cache_implementation", "prefill_chunk_size"):
            if getattr(generation_config, name, None) is not None:
                raise GenerationError(
                    f"generate does not take {name}: sequences are kept in an MQWenCache, prompts go in at once; "
                    "for chunks call forward with MQWenCache(prompt_lengths=...)"
                )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = MQWenCache()

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat rows for beams or several answers; a row's pictures are encoded once and stay together."""
        pixel_values, images = model_kwargs.pop("pixel_values", None), model_kwargs.pop("images", None)
        if pixel_values is not None:
            images = self.encode_images(pixel_values)
        if images is not None and expand_size > 1:
            assert input_ids is not None
            counts = (input_ids == self.config.image_token_id).sum(1).tolist()
            if sum(counts) != len(images):
                raise PictureCountError(sum(counts), len(images))
            images = torch.cat([part for row in images.split(counts) for part in [row] * expand_size])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "images": images}
