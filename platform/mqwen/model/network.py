"""MQWenLMHeadModel: Qwen v1 that reads pictures through a CLIP vision tower.

Shapes: B rows, T ids of a row as given, L positions of a row after expansion, N pictures, P positions of a picture,
H, W height and width of a picture, C hidden channels, V vocabulary, M positions asked for.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from mqwen.model.artifact import check_artifact
from mqwen.model.blocks import Projector, VisionTower
from mqwen.model.cache import MQWenCache
from mqwen.model.components import component_weights, components_config, load_components
from mqwen.model.configuration import MQWenConfig
from mqwen.model.errors import CacheError, PictureShapeError, SegmentError
from mqwen.model.files import Folder
from mqwen.model.generation import PictureGenerationMixin
from mqwen.model.loss import Head, labelled_loss, token_loss
from mqwen.model.splice import PaddingSide
from mqwen.model.transformer import MQWenModel, MQWenPreTrainedModel


class MQWenLMHeadModel(MQWenPreTrainedModel, PictureGenerationMixin):
    """MQWenModel with a vision tower, a projector and a language-model head.

    Parameters: `transformer.*` and `lm_head.*` as in Qwen v1, `visual.vision_model.*` as in CLIP, `feature_proj.0` and
    `feature_proj.2` the projector.
    """

    def __init__(self, config: MQWenConfig) -> None:
        super().__init__(config)
        self.transformer = MQWenModel(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.visual = VisionTower(config.vision_config)
        self.feature_proj = Projector(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Projected features of pictures, to be given to forward as `images`.

        Args:
            pixel_values: (N, 3, H, W) with H = W = vision_config.image_size. uint8: raw RGB, 0 to 255, normalised here,
                on the device, by image_mean and image_std. Floating: already normalised.

        Returns:
            (N, P, C). With N = 0 one blank picture runs through tower and projector all the same and is cut off again:
            every rank of a sharded model then runs the same collectives, and gradients (of zero) reach the projector.

        Raises:
            PictureShapeError: another shape or dtype.
        """
        size = self.config.vision_config.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise PictureShapeError(
                f"pixel_values must be (pictures, 3, {size}, {size}), not {tuple(pixel_values.shape)}; "
                "MQWenProcessor makes them so"
            )
        weight: Tensor = self.get_parameter("feature_proj.0.weight")
        pictures = pixel_values.to(weight.device, non_blocking=True)
        if pictures.dtype == torch.uint8:
            channels = zip(pictures.unbind(1), self.config.image_mean, self.config.image_std, strict=True)
            pictures = torch.stack([(c.float() / 255 - mean) / std for c, mean, std in channels], dim=1)
        elif not pictures.is_floating_point():
            raise PictureShapeError(
                f"pixel_values must be uint8 (raw, 0..255) or floating (normalised), not {pictures.dtype}"
            )
        count = len(pictures)
        if count == 0:
            pictures = pictures.new_zeros(1, 3, size, size)
        return self.feature_proj(self.visual(pictures.to(weight.dtype)))[:count]

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        pixel_values: Tensor | None = None,
        past_key_values: MQWenCache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor | Literal["labels"] = 0,
        num_items_in_batch: Tensor | int | float | None = None,
        padding_side: PaddingSide = "right",
        row_length: int = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss where labels are given.

        One placeholder (config.image_token_id) in the ids stands for one picture; any number in a row. Labels, mask and
        segment ids may come as long as the ids or as the expanded rows (see `splice.expand`). Given on the CPU, ids and
        what goes with them are planned there and copied to the device without a wait.

        Args:
            input_ids: (B, T), integers. With a cache, the new ids only.
            images: (N, P, C), features from `encode_images`; or
            pixel_values: (N, 3, H, W), pictures as `encode_images` takes them, in the placeholders' row-major order.
                (0, 3, H, W) keeps tower and projector in the graph for a batch without pictures.
            past_key_values: what an earlier call returned; grows in place.
            attention_mask: (B, T) or (B, L), 0 is padding, on either side; with a cache also the whole grown mask.
            position_ids: taken for transformers' sake and ignored, as in Qwen v1: positions follow from masks,
                segments and cache.
            segment_ids: (B, T) or (B, L), packed rows: 0 padding, from 1 the conversation. Each conversation comes out
                as if it were alone. Not with a cache.
            labels: (B, T) or (B, L), -100 is ignored; the shift by one is done here.
            use_cache: return a cache also where none is given; None: as the configuration says, but not in training,
                with labels, or packed.
            logits_to_keep: 0 all positions; n the last n; (M,) integers those positions; "labels": the loss only, from
                the labelled positions in chunks, and no logits.
            num_items_in_batch: what the summed loss is divided by; None: the labelled positions of this batch.
            padding_side: where rows that hold fewer pictures are filled up.
            row_length: rows are filled up to it, so that compiled blocks see one shape.

        Returns:
            loss (float32 scalar or None), logits (B, L or fewer, V) or None, past_key_values, hidden_states.

        Raises:
            MQWenError: one of its kinds for each way in which the arguments can contradict each other; see errors.py.
        """
        given = [name for name, value in unused.items() if value is not None and value is not False]
        if given:
            raise TypeError(f"MQWenLMHeadModel.forward does not take {', '.join(given)}")
        if past_key_values is not None and not isinstance(past_key_values, MQWenCache):
            raise CacheError(f"past_key_values must be an MQWenCache, not {type(past_key_values).__name__}")
        if segment_ids is not None and (past_key_values is not None or use_cache):
            raise SegmentError("packed rows (segment_ids) cannot be cached; give each conversation a row of its own")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None and segment_ids is None
        if pixel_values is not None:
            if images is not None:
                raise PictureShapeError("give images (features) or pixel_values (pictures), not both")
            images = self.encode_images(pixel_values)
        self._check_features(images)
        expanded = self.transformer.expand(
            input_ids,
            0 if images is None else len(images),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            labels=labels,
            padding_side=padding_side,
            row_length=row_length,
        )
        output = self.transformer(
            images=images,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            expanded=expanded,
        )
        hidden = output.last_hidden_state
        loss = logits = None
        if isinstance(logits_to_keep, str):
            if logits_to_keep != "labels" or expanded.labels is None:
                raise ValueError(
                    f'logits_to_keep={logits_to_keep!r}: a number, positions, or "labels" with labels given'
                )
            loss = labelled_loss(self.lm_head, hidden, expanded, num_items_in_batch)
        elif expanded.labels is not None:
            logits = self.lm_head(hidden)
            loss = token_loss(logits, expanded, num_items_in_batch)
            logits = logits[:, _kept(logits_to_keep)]
        else:
            logits = self.lm_head(hidden[:, _kept(logits_to_keep)])
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
        return result.to_tuple() if return_dict is False else result

    def _check_features(self, images: Tensor | None) -> None:
        expected = (self.config.image_positions, self.config.hidden_size)
        if images is not None and (images.dim() != 3 or tuple(images.shape[1:]) != expected):
            raise PictureShapeError(
                f"images must be features (pictures, {expected[0]}, {expected[1]}), not {tuple(images.shape)}; "
                "encode_images makes them from pixel_values"
            )

    @classmethod
    def from_components(
        cls,
        qwen: Folder,
        clip: Folder,
        projector: Folder | None = None,
        adapter: Folder | None = None,
        image_token_id: int | None = None,
        dtype: torch.dtype = torch.float32,
        pickled: bool = False,
    ) -> MQWenLMHeadModel:
        """Build the model from published parts.

        Args:
            qwen: folder of a Qwen v1 checkpoint (config.json, safetensors).
            clip: folder of a CLIP checkpoint; its vision tower is taken, and its pixel statistics.
            projector: safetensors file with 0.weight, 0.bias, 2.weight, 2.bias; None: freshly initialised.
            adapter: folder of a LoRA adapter to merge into the weights, see `adapters.attach_adapter`.
            image_token_id: the placeholder; None: <|extra_0|> of Qwen's vocabulary, 151646.
            dtype: of all parameters.
            pickled: also read pytorch_model*.bin of a folder without safetensors, and a projector called *.bin, by
                weights-only loading, which runs no code of theirs.

        Returns:
            The model, in eval mode, on the CPU.

        Raises:
            CheckpointError: a file is missing, truncated, or holds another model's weights.
            ConfigurationError: a configuration that this network does not compute.
            AdapterError: an adapter for other modules.
        """
        config = components_config(qwen, clip, image_token_id)
        with init.no_init_weights():
            model = cls(config).to(dtype)
        if projector is None:
            model.feature_proj.apply(model._init_weights)
        weights = component_weights(qwen, clip, projector, pickled=pickled)
        load_components(model, weights, projector=projector is not None)
        if adapter is not None:
            from mqwen.model.adapters import merge_adapter  # brings peft, whose import all others need not wait for

            merge_adapter(model, adapter)
        return model.eval()

    @classmethod
    def from_pretrained(cls, directory: Folder, **kwargs: Any) -> MQWenLMHeadModel:
        """Read the artifact that `save_pretrained` wrote: config.json and safetensors in a local folder.

        Keyword arguments go to transformers' from_pretrained (dtype, device_map, ...). On the CPU, in the files' own
        dtype, the weights stay mapped: pages that processes share, read when they are first used.

        Raises:
            CheckpointError, ConfigurationError: as `check_artifact`, before any weight is read.
        """
        check_artifact(directory)
        return super().from_pretrained(directory, use_safetensors=True, local_files_only=True, **kwargs)


def _kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    """Index of the positions whose logits are asked for; slice(-0, None) takes all."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
