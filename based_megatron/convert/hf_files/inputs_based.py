"""What a call of the model may be given besides tokens: caches, masks of padding, packed documents.

Legend: B batch, T tokens of this call, S tokens with those of the cache.
"""

from dataclasses import fields

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_based import BasedConfig

CACHE_NAME = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))
"""Name of the cache in arguments and outputs of the installed transformers, renamed in 5.24. We take both names."""


def given_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that was given, under either of its names."""
    if cache is not None and past_key_values is not None:
        raise ValueError("give one of cache and past_key_values: they are two names of one argument")
    return past_key_values if cache is None else cache


def document_numbers(
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    mask_BT: Tensor | None,
    shape: tuple[int, int],
) -> Tensor | None:
    """The number of each token's document [B, T], counted in each row; None if rows hold one document each.

    Documents begin where positions do not go on by one, where the numbers in `seq_idx` [B, T] change, or at the offsets
    `cu_seq_lens_q` into a batch of one row: the ways in which trainers that pack sequences tell of them. Positions of padding
    mean nothing.
    """
    B, T = shape
    if T == 1 or (position_ids is None and seq_idx is None and cu_seq_lens_q is None):
        return None
    device = next(given.device for given in (position_ids, seq_idx, cu_seq_lens_q) if given is not None)
    begins_BT = torch.zeros(B, T, dtype=torch.bool, device=device)
    if position_ids is not None:
        begins_BT[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
    if seq_idx is not None:
        if tuple(seq_idx.shape) != shape:
            raise ValueError(f"seq_idx must be [batch, tokens] = {list(shape)}, got {list(seq_idx.shape)}")
        begins_BT[:, 1:] |= seq_idx[:, 1:] != seq_idx[:, :-1]
    if cu_seq_lens_q is not None:
        if B != 1:
            raise ValueError(f"cu_seq_lens_q are offsets into a batch of one row, but there are {B}: give seq_idx")
        places = torch.arange(T, device=device)
        begins_BT |= (places[:, None] == cu_seq_lens_q.flatten().to(device)).any(1)
    begins_BT[:, 0] = False
    if mask_BT is not None:
        begins_BT[:, 1:] &= mask_BT[:, 1:] & mask_BT[:, :-1]
    # A graph that is being compiled cannot ask what its tensors hold.
    if not torch.compiler.is_compiling() and not begins_BT.any():
        return None
    return begins_BT.cumsum(1)


def check_mask(attention_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mask as booleans [B, S]. Raises ValueError if it is no mask of padding, or has padding between tokens."""
    if tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"attention_mask must be [batch, cached + new tokens] = {list(shape)}, got {list(attention_mask.shape)}"
        )
    if attention_mask.is_floating_point():
        raise ValueError(
            f"attention_mask is {attention_mask.dtype}: give integers or booleans, 1 for tokens and 0 for padding, not numbers to add"
        )
    mask_BS = attention_mask.bool()
    if not torch.compiler.is_compiling():
        starts_B = (mask_BS[:, 1:] & ~mask_BS[:, :-1]).sum(1) + mask_BS[:, 0]
        if (starts_B > 1).any():
            row = int((starts_B > 1).nonzero()[0])
            raise ValueError(
                f"attention_mask has zeros between the tokens of row {row}: padding may only be on the left or right of a row "
                f"(documents that are packed are told apart by position_ids that restart, or seq_idx)"
            )
    return mask_BS


def knows_length(cache: Cache) -> bool:
    """Whether a cache can say how many tokens went in: that of transformers cannot where no layer is attention."""
    return isinstance(cache, BasedCache) or any(isinstance(layer, DynamicLayer) for layer in cache.layers)


def past_tokens(cache: Cache | None, attention_mask: Tensor | None, new_tokens: int) -> int:
    """Tokens that went into a cache, padding included.

    One that does not know takes the mask's word: with no attention layer, nothing else depends on it.
    """
    if cache is None or knows_length(cache):
        return 0 if cache is None else cache.get_seq_length()
    return 0 if attention_mask is None else max(attention_mask.shape[1] - new_tokens, 0)


class BasedCache(DynamicCache):
    """The cache of transformers for `config.layer_types`, which also knows its length where no layer is attention."""

    is_compileable = False  # the window grows until it is full

    def __init__(self, config: BasedConfig):
        super().__init__(config=config)
        self.config = config
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that went in, padding included."""
        return self.seen_tokens

    def reset(self) -> None:
        """Start over with empty layers; those that transformers 5.17 resets keep zeros as keys."""
        self.layers = DynamicCache(config=self.config).layers
        self.seen_tokens = 0

    def state_bytes(self) -> int:
        """Bytes of all states."""
        tensors: list[Tensor | None] = []
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                tensors += [*layer.conv_states.values(), *layer.recurrent_states.values()]
            elif isinstance(layer, DynamicLayer) and layer.is_initialized:
                tensors += [layer.keys, layer.values]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def counting(cache: DynamicCache, config: BasedConfig) -> BasedCache:
    """A cache of ours on the layers of an empty one that does not know its length. Raises ValueError if it is not empty."""
    layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    for layer in layers:
        if any(state is not None for state in (*layer.conv_states.values(), *layer.recurrent_states.values())):
            raise ValueError(
                "a DynamicCache does not know its length where no layer is attention: give generate that of an earlier output"
            )
    ours = BasedCache(config)
    ours.layers = cache.layers
    return ours
