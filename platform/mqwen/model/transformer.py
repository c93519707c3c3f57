"""MQWenModel: Qwen v1's transformer, with picture features in the places of the placeholders.

Shapes: B rows, T ids of a row as given, L positions of a row after expansion, N pictures, P positions of a picture,
C hidden channels.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast

from mqwen.model.attention import AttentionPlan
from mqwen.model.blocks import Block, RMSNorm
from mqwen.model.cache import MQWenCache
from mqwen.model.configuration import MQWenConfig
from mqwen.model.errors import CacheError
from mqwen.model.rotary import logn_factors, ntk_alpha, rotary_tables
from mqwen.model.rows import Expanded, lengths_of, positions_of
from mqwen.model.splice import PaddingSide, expand


class MQWenPreTrainedModel(PreTrainedModel):
    """What both models share with transformers: configuration, initial values, checkpointing of blocks."""

    config_class = MQWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block", "CLIPEncoderLayer"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with initializer_range, or with the `init_std` that a linear layer names; biases 0, norms 1."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=getattr(module, "init_std", self.config.initializer_range))
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)


class MQWenModel(MQWenPreTrainedModel):
    """Qwen v1's transformer, with picture features in the places of the placeholders."""

    def __init__(self, config: MQWenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.num_hidden_layers)])
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    def expand(
        self,
        input_ids: Tensor,
        pictures: int,
        *,
        past_key_values: MQWenCache | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: PaddingSide = "right",
        row_length: int = 0,
    ) -> Expanded:
        """`splice.expand` with this model's constants; the rows come out on the model's device."""
        if past_key_values is not None:
            attention_mask = past_key_values.mask_of_new(attention_mask, input_ids.shape[1])
        return expand(
            input_ids,
            pictures,
            image_token_id=self.config.image_token_id,
            image_positions=self.config.image_positions,
            vocab_size=self.config.vocab_size,
            labels=labels,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            padding_side=padding_side,
            row_length=row_length,
        ).to(self.wte.weight.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        images: Tensor | None = None,
        past_key_values: MQWenCache | None = None,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        padding_side: PaddingSide = "right",
        expanded: Expanded | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the expanded rows.

        Args:
            images: (N, P, C), projected features of the pictures, in the placeholders' row-major order.
            expanded: the rows as `self.expand` returns them, from a caller that needs them too; ids, mask, segment ids
                and padding side are not looked at then.
            other arguments: as MQWenLMHeadModel.forward.

        Returns:
            last_hidden_state (B, L, C), after ln_f; past_key_values; hidden_states if asked for: the embeddings and
            each block's output, the last one after ln_f.
        """
        if expanded is None:
            assert input_ids is not None, "input_ids or expanded"
            expanded = self.expand(
                input_ids,
                0 if images is None else len(images),
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                segment_ids=segment_ids,
                padding_side=padding_side,
            )
        if past_key_values is None and use_cache:
            past_key_values = MQWenCache()
        if past_key_values is not None and self.training and self.h[0].gradient_checkpointing:
            raise CacheError("checkpointed blocks run twice and keep no cache: use_cache=False, or eval mode")
        plan = self._plan(expanded, past_key_values)

        hidden = self.wte(expanded.ids)
        if images is not None:
            features = images.to(hidden.device, hidden.dtype).flatten(0, 1)
            hidden = hidden.flatten(0, 1).index_copy(0, expanded.slots, features).view_as(hidden)

        states = [hidden]
        for block in self.h:
            hidden = block(hidden, plan)
            if output_hidden_states:
                states.append(hidden)
        states[-1] = hidden = self.ln_f(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _plan(self, expanded: Expanded, cache: MQWenCache | None) -> AttentionPlan:
        """Rotary tables, logn factors and visibility, once for all layers; takes the rows into the cache.

        Dynamic NTK and logn belong to eval mode: Qwen v1 trains without both.
        """
        config = self.config
        extends = not self.training and (config.use_dynamic_ntk or config.use_logn_attn)
        positions = positions_of(expanded)
        past_length = 0
        alpha = None
        if cache is None:
            if extends and expanded.ids.shape[1] > config.seq_length and config.use_dynamic_ntk:
                alpha = ntk_alpha(lengths_of(expanded), config.seq_length)
        else:
            past_length = cache.key_length
            if cache.lengths is not None:
                positions = positions + cache.lengths.unsqueeze(1)
            cache.append(expanded, positions)
            if past_length == 0 and extends and config.use_dynamic_ntk:
                cache.fix_alpha(config.seq_length)
            alpha = None if cache.alpha is None else cache.alpha.unsqueeze(1)
        cos, sin = rotary_tables(positions, alpha, config.rotary_dim, config.rotary_emb_base)
        reaches = past_length + expanded.ids.shape[1] > config.seq_length
        logn = logn_factors(positions, config.seq_length) if extends and config.use_logn_attn and reaches else None
        plan = AttentionPlan(cos, sin, logn, cache)
        plan.see(expanded, past_length, None if cache is None else cache.mask)
        return plan
