"""Based: gated short convolutions, linear attention of second order and sliding window attention (arXiv 2402.18668).

Decoding needs a state of constant size: the last inputs of each convolution, the packed moments of each linear
attention layer and the last keys and values of each window. Linear attention, its states and the residual stream are
float32 (or float64) whatever the dtype of the weights.

Legend: B batch, T tokens of this call, S tokens with those of the cache, D hidden size, R rotated pairs of a head.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .configuration_based import BasedConfig
from .inputs_based import (
    CACHE_NAME,
    BasedCache,
    check_mask,
    counting,
    document_numbers,
    given_cache,
    knows_length,
    past_tokens,
)
from .mixers_based import MIXERS, BasedGatedConv, BasedHeadNorm, BasedMLP, BasedOutput, BasedRMSNorm, wide_dtype

logger = logging.get_logger(__name__)


class BasedBlock(GradientCheckpointingLayer):
    """Mixer and MLP, each after a norm and each added to a float32 residual."""

    def __init__(self, config: BasedConfig, layer_idx: int, mixers: Mapping[str, type[nn.Module]]):
        super().__init__()
        self.mixer_norm = BasedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = mixers[config.mixers[layer_idx]](config, layer_idx)
        self.mlp_norm = BasedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = BasedMLP(config)

    def forward(
        self,
        residual_BTD: Tensor,
        mask_BS: Tensor | None,
        cache: Cache | None,
        rotary: tuple,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        # A mixer that does not know documents is not asked to: BasedModel has refused them.
        packed = {} if documents_BT is None else {"documents_BT": documents_BT}
        mixed_BTD = self.mixer(self.mixer_norm(residual_BTD), mask_BS=mask_BS, cache=cache, rotary=rotary, **packed)
        residual_BTD = residual_BTD + mixed_BTD
        return residual_BTD + self.mlp(self.mlp_norm(residual_BTD))


class BasedPreTrainedModel(PreTrainedModel):
    config: BasedConfig
    config_class = BasedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BasedBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            layers = self.config.num_hidden_layers
            init.normal_(module.weight, std=std / math.sqrt(2 * layers) if isinstance(module, BasedOutput) else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, BasedRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, BasedHeadNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, BasedGatedConv):
            bound = module.conv_weight.shape[1] ** -0.5
            init.uniform_(module.conv_weight, -bound, bound)


class BasedModel(BasedPreTrainedModel):
    """The model without its output projection."""

    def __init__(self, config: BasedConfig, mixers: Mapping[str, type[nn.Module]] = MIXERS):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BasedBlock(config, i, mixers) for i in range(config.num_hidden_layers))
        self.norm = BasedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def _rotary(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, 1, T, 2R] of the rotary angles, in float32 or float64."""
        config, device = self.config, positions_BT.device
        dims = int(config.hidden_size // config.num_attention_heads * config.rotary_fraction)
        # At position 1e6 an angle in float32 is off by 0.03; mps has no float64.
        precise = torch.float32 if device.type == "mps" else torch.float64
        exponents = torch.arange(0, dims, 2, device=device, dtype=precise) / max(dims, 1)
        angles = positions_BT[:, None, :, None].to(precise) * config.rotary_base**-exponents
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(wide_dtype(dtype)), angles.sin().to(wide_dtype(dtype))

    def _fitting(self, cache: Cache | None) -> Cache | None:
        """The cache, if it is one for this model. Raises ValueError."""
        if cache is None or (isinstance(cache, BasedCache) and len(cache.layers) == self.config.num_hidden_layers):
            return cache
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"{type(cache).__name__} is not supported: the state of a Based model is small already")
        if len(cache.layers) != self.config.num_hidden_layers:
            raise ValueError(
                "the cache was made for another model: give none at first, and then that of the last output"
            )
        return cache

    def _state_or_documents(
        self, cache: Cache | None, use_cache: bool | None, documents_BT: Tensor | None
    ) -> tuple[Cache | None, Tensor | None]:
        """The cache that this call goes on from and fills, or the documents that it keeps apart. Raises ValueError for both."""
        if cache is not None and torch.compiler.is_compiling():
            return cache, None  # positions of a compiled decoding step go on
        if documents_BT is not None:
            if cache is not None or use_cache:
                raise ValueError(
                    "packed documents leave no state to go on from: set use_cache=False, or give one document a row"
                )
            self._check_documents()
            return None, documents_BT
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError(
                    "gradient checkpointing runs layers twice and would update the cache twice: give no cache"
                )
            if use_cache:
                logger.warning_once("use_cache is ignored: gradient checkpointing runs layers twice")
            return None, None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return (BasedCache(self.config) if use_cache and cache is None else cache), None

    def _check_documents(self) -> None:
        """Raise ValueError for a model that cannot keep packed documents apart."""
        if self.config.prefix_tokens:
            raise ValueError(
                "packed documents have no prefix of their own: give a model with prefix_tokens one document a row"
            )
        for layer in self.layers:
            if not getattr(layer.mixer, "keeps_documents_apart", False):
                raise ValueError(
                    f"{type(layer.mixer).__name__} cannot keep packed documents apart: give one document a row"
                )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, D] of `input_ids` [B, T], which continue those in `cache`, or `past_key_values`.

        `attention_mask` [B, S] is 0 at padding, which may only be on the left of a row; with a cache it covers the
        cached tokens too. Positions matter in window and full attention only, and only relative to each other. Packed
        documents (`document_numbers`) do not see each other; they take no cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x_BTD.shape
        cache = self._fitting(given_cache(cache, past_key_values))
        past = past_tokens(cache, attention_mask, T)
        mask_BS = None if attention_mask is None else check_mask(attention_mask, (B, past + T))
        mask_BT = None if mask_BS is None else mask_BS[:, past:]
        documents_BT = document_numbers(position_ids, seq_idx, cu_seq_lens_q, mask_BT, (B, T))
        cache, documents_BT = self._state_or_documents(cache, use_cache, documents_BT)
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=x_BTD.device)[None]
            if mask_BS is not None:
                position_ids = (mask_BS.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        if mask_BS is not None and not torch.compiler.is_compiling() and mask_BS.all():
            mask_BS = None

        rotary = self._rotary(position_ids, x_BTD.dtype)
        residual_BTD = x_BTD.to(wide_dtype(x_BTD.dtype))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(residual_BTD)
            residual_BTD = layer(residual_BTD, mask_BS, cache, rotary, documents_BT)
        y_BTD = self.norm(residual_BTD)
        if isinstance(cache, BasedCache):
            cache.seen_tokens += T
        return BaseModelOutputWithPast(
            last_hidden_state=y_BTD,
            hidden_states=(*hidden_states, y_BTD) if output_hidden_states else None,
            **{CACHE_NAME: cache},  # type: ignore[arg-type]
        )


class BasedForCausalLM(BasedPreTrainedModel, GenerationMixin):
    """Based with its output projection, a causal language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: BasedConfig, mixers: Mapping[str, type[nn.Module]] = MIXERS):
        super().__init__(config)
        self.model = BasedModel(config, mixers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):  # type: ignore[override]
        """Called by generate: our cache is the default one."""
        cache = given_cache(model_kwargs.pop("cache", None), model_kwargs.pop("past_key_values", None))
        if isinstance(cache, DynamicCache) and not knows_length(cache):
            cache = counting(cache, self.config)
        if cache is not None:
            model_kwargs[CACHE_NAME] = cache
        default = generation_config.cache_implementation in (None, "dynamic")
        if default and generation_config.use_cache is not False and cache is None:
            model_kwargs[CACHE_NAME] = BasedCache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size]; with `labels` (unshifted, -100 is ignored) the mean next-token loss too.

        `logits_to_keep` keeps the last so many positions (0 keeps all), or those of an index tensor.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=given_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


__all__ = ["BasedForCausalLM", "BasedModel", "BasedPreTrainedModel"]
