"""Layers of Based: norm, gated MLP and the four mixers. A mixer continues from its state in the cache and updates it.

Legend: B batch, T tokens of this call, S tokens with those of the cache, H heads, D hidden size, F feature dim: of queries and
keys of linear attention, V value head dim (in windows that of queries and keys too), R packed features: 1 + F + F (F + 1) / 2 of
the Taylor map, F (F + 1) / 2 of squares alone (rotary: rotated pairs), C channels and K - 1 past inputs of a convolution, E both
halves of its projection, 2 C.

Where a row packs several documents, documents_BT holds the number of each token's document: no number comes back after another.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .configuration_based import BasedConfig
from .fast_based import fast_attention, fast_convolution, fast_window

LINEAR_CHUNK_TOKENS = 128
ATTENTION_BLOCK_TOKENS = 512


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of residual, states and normalisers: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def _split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    return x_BTD.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge_heads(x_BHTV: Tensor) -> Tensor:
    return x_BHTV.transpose(1, 2).flatten(-2)


class BasedOutput(nn.Linear):
    """A projection back to the residual: its initial weights are smaller."""


class BasedRMSNorm(nn.Module):
    """Root mean square norm of a float32 residual, in the dtype of the weights."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(wide_dtype(x.dtype))
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(self.weight.dtype)


class BasedMLP(nn.Module):
    """Gated MLP: down(up(x) * silu(gate(x)))."""

    def __init__(self, config: BasedConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = BasedOutput(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x_BTD) * F.silu(self.gate_proj(x_BTD)))


def _cached_states(cache: Cache | None, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
    """Convolution and recurrent state of a layer, None where nothing is cached.

    Not by Cache.get_conv_state and get_recurrent_state: transformers 5.17 to 5.20 have none, and the latter always
    answers None for a layer without a convolution state.
    """
    if cache is None:
        return None, None
    layer: Any = cache.layers[layer_idx]
    states = layer.conv_states[0], layer.recurrent_states[0]
    if not torch.is_grad_enabled():
        return states
    # The cache is updated in place, but a backward pass needs the states of this call.
    return tuple(None if state is None else state.clone() for state in states)  # type: ignore[return-value]


def conv_in_documents(u_BCS: Tensor, weight_CK: Tensor, documents_BT: Tensor) -> Tensor:
    """Causal convolution [B, C, T] of T tokens after K - 1 past inputs, which takes no input of another document."""
    T, past = documents_BT.shape[1], weight_CK.shape[1] - 1
    outside = documents_BT.new_full((len(documents_BT), past), -1)
    documents_BS = torch.cat([outside, documents_BT], dim=1)
    taps = []
    for k in range(past + 1):
        same_B1T = (documents_BS[:, k : k + T] == documents_BT)[:, None]
        taps.append(u_BCS[..., k : k + T] * same_B1T * weight_CK[:, k, None])
    return torch.stack(taps).sum(0)


class BasedGatedConv(nn.Module):
    """Gated short convolution: out(silu(conv(u1)) * u2) with [u1, u2] = in(x); the last tap is the present."""

    keeps_documents_apart = True

    def __init__(self, config: BasedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.channels = config.hidden_size * config.conv_expand // 2
        self.in_proj = nn.Linear(config.hidden_size, 2 * self.channels)
        self.conv_weight = nn.Parameter(torch.empty(self.channels, config.conv_kernel))
        self.out_proj = BasedOutput(self.channels, config.hidden_size)

    def forward(
        self,
        x_BTD: Tensor,
        mask_BS: Tensor | None,
        cache: Cache | None,
        documents_BT: Tensor | None = None,
        **_,
    ) -> Tensor:
        projected_BTE = self.in_proj(x_BTD)
        u1_BTC, u2_BTC = projected_BTE.chunk(2, dim=-1)
        if mask_BS is not None:  # the projection has a bias: padding must be zeroed after it
            u1_BTC = u1_BTC * mask_BS[:, -u1_BTC.shape[1] :, None]
        past = self.conv_weight.shape[1] - 1
        before_BCK = _cached_states(cache, self.layer_idx)[0]
        y_BTC = None
        if mask_BS is None:
            y_BTC = fast_convolution(projected_BTE, self.conv_weight, before_BCK, documents_BT)
            if y_BTC is not None and cache is None:
                return self.out_proj(y_BTC)
        if before_BCK is None:
            before_BCK = u1_BTC.new_zeros(u1_BTC.shape[0], self.channels, past)
        u1_BCS = torch.cat([before_BCK, u1_BTC.transpose(1, 2)], dim=-1)
        if cache is not None and past:
            cache.update_conv_state(u1_BCS[..., -past:], self.layer_idx)
        if y_BTC is not None:
            return self.out_proj(y_BTC)
        if documents_BT is None:
            c_BCT = F.conv1d(u1_BCS, self.conv_weight.unsqueeze(1), groups=self.channels)
        else:
            c_BCT = conv_in_documents(u1_BCS, self.conv_weight, documents_BT)
        return self.out_proj(F.silu(c_BCT).transpose(1, 2) * u2_BTC)


class BasedHeadNorm(nn.Module):
    """Layer norm of each head's vector, with a scale and a shift of its own."""

    def __init__(self, heads: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads * size))
        self.bias = nn.Parameter(torch.zeros(heads * size))

    def forward(self, x_BHTF: Tensor) -> Tensor:
        weight_H1F, bias_H1F = (x.view(x_BHTF.shape[1], 1, -1) for x in (self.weight, self.bias))
        normed = F.layer_norm(x_BHTF.to(wide_dtype(x_BHTF.dtype)), x_BHTF.shape[-1:], eps=1e-5)
        return (normed * weight_H1F + bias_H1F).to(x_BHTF.dtype)


def packed_features(x: Tensor, square: bool) -> Tensor:
    """Packed second order map [..., F] -> [..., R]: with s = q . k, phi(q) . phi(k) = 1 + s + s^2 / 2, or s^2."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    half = torch.ones(len(i), dtype=x.dtype, device=x.device)  # an off-diagonal pair stands for both of its orders
    half = half.masked_fill(i == j, math.sqrt(0.5))
    if square:
        return x[..., i] * x[..., j] * half * math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j] * half], dim=-1)


def taylor_attention(
    q_BHTF: Tensor,
    k_BHTF: Tensor,
    v_BHTV: Tensor,
    valid_BT: Tensor | None,
    state_BHRV: Tensor | None,
    square: bool = False,
    documents_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention with weights 1 + s + s^2 / 2, or s^2, s = q . k / sqrt(F), by chunks: memory is linear in T.

    The state is the sum of phi(k) [v, 1]: [B, H, R, V + 1], with the normaliser as the last column. Inputs and state
    are float32 or float64. Returns the output [B, H, T, V] and the state after the last token, which is that of its document.
    """
    scale = q_BHTF.shape[-1] ** -0.25
    q_BHTF, k_BHTF = q_BHTF * scale, k_BHTF * scale
    v_BHTV = torch.cat([v_BHTV, torch.ones_like(v_BHTV[..., :1])], dim=-1)
    if valid_BT is not None:  # padding has no weight, in the normaliser neither
        v_BHTV = v_BHTV * valid_BT[:, None, :, None]
    outputs = []
    for start in range(0, q_BHTF.shape[2], LINEAR_CHUNK_TOKENS):
        chunk = slice(start, start + LINEAR_CHUNK_TOKENS)
        q, k, v = q_BHTF[:, :, chunk], k_BHTF[:, :, chunk], v_BHTV[:, :, chunk]
        s = q @ k.transpose(-1, -2)
        weights = torch.tril(s.square() if square else 1 + s + 0.5 * s.square())
        features = packed_features(k, square)
        if documents_BT is not None:
            ids_BC = documents_BT[:, chunk]
            last_B1, before_B1 = ids_BC[:, -1:], documents_BT[:, max(start - 1, 0), None]
            weights = weights * (ids_BC[:, None, :, None] == ids_BC[:, None, None, :])
            features = features * (ids_BC == last_B1)[:, None, :, None]  # the state is that of the last document
        out = weights @ v
        if state_BHRV is not None:
            past = packed_features(q, square) @ state_BHRV
            if documents_BT is not None:
                past = past * (ids_BC == before_B1)[:, None, :, None]
                state_BHRV = state_BHRV * (last_B1 == before_B1)[:, None, :, None]
            out = out + past
        outputs.append(out)
        update = features.transpose(-1, -2) @ v
        state_BHRV = update if state_BHRV is None else state_BHRV + update
    y_BHTV = torch.cat(outputs, dim=2)
    return y_BHTV[..., :-1] / (y_BHTV[..., -1:] + (1e-5 if square else 1e-12)), state_BHRV


class BasedLinearAttention(nn.Module):
    """Linear attention with the second order Taylor map of exp, or squares of normed queries and keys. No positions, no gate."""

    keeps_documents_apart = True

    def __init__(self, config: BasedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        self.square = config.feature_map == "rebased"
        self.q_norm, self.k_norm = (
            BasedHeadNorm(self.heads, config.feature_dim) if self.square else nn.Identity() for _ in range(2)
        )
        self.q_proj = nn.Linear(config.hidden_size, self.heads * config.feature_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.heads * config.feature_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = BasedOutput(config.hidden_size, config.hidden_size, bias=False)
        self.prefix_tokens = config.prefix_tokens
        if self.prefix_tokens:
            self.prefix_k_proj = nn.Linear(config.hidden_size, self.heads * config.feature_dim, bias=False)
            self.prefix_v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def _prefix_state(self, x_BTD: Tensor, valid_BT: Tensor | None) -> Tensor | None:
        """The state of the first tokens of each row, padding left out, which all of its tokens see."""
        if valid_BT is None:
            valid_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        in_prefix_BT = valid_BT & (valid_BT.cumsum(1) <= self.prefix_tokens)
        end = int(in_prefix_BT.any(0).nonzero().max()) + 1 if in_prefix_BT.any() else 1
        k, v = (_split_heads(proj(x_BTD[:, :end]), self.heads) for proj in (self.prefix_k_proj, self.prefix_v_proj))
        with torch.autocast(x_BTD.device.type, enabled=False):
            wide = wide_dtype(x_BTD.dtype)
            k, v = self.k_norm(k).to(wide), v.to(wide)
            return taylor_attention(k, k, v, in_prefix_BT[:, :end], None, self.square)[1]

    def forward(
        self,
        x_BTD: Tensor,
        mask_BS: Tensor | None,
        cache: Cache | None,
        documents_BT: Tensor | None = None,
        **_,
    ) -> Tensor:
        state_BHRV = _cached_states(cache, self.layer_idx)[1]
        q, k, v = (_split_heads(proj(x_BTD), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        with torch.autocast(x_BTD.device.type, enabled=False):
            wide = wide_dtype(x_BTD.dtype)
            valid_BT = None if mask_BS is None else mask_BS[:, -x_BTD.shape[1] :]
            if self.prefix_tokens and state_BHRV is None:
                state_BHRV = self._prefix_state(x_BTD, valid_BT)
            q, k = self.q_norm(q), self.k_norm(k)
            fast = None
            if valid_BT is None:
                fast = fast_attention(q, k, v, state_BHRV, self.square, documents_BT, taylor_attention)
            y_BHTV, state_BHRV = fast or taylor_attention(
                q.to(wide), k.to(wide), v.to(wide), valid_BT, state_BHRV, self.square, documents_BT
            )
        if cache is not None and state_BHRV is not None:
            cache.update_recurrent_state(state_BHRV, self.layer_idx)
        return self.o_proj(_merge_heads(y_BHTV).to(x_BTD.dtype))


def rotate(x_BHTV: Tensor, cos_B1T2R: Tensor, sin_B1T2R: Tensor) -> Tensor:
    """Rotary positions on the first 2R dims of each head, in half-split pairs (r, r + R)."""
    x, rest = x_BHTV.split([cos_B1T2R.shape[-1], x_BHTV.shape[-1] - cos_B1T2R.shape[-1]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    rotated = x * cos_B1T2R + torch.cat([-second, first], dim=-1) * sin_B1T2R
    return torch.cat([rotated.to(x_BHTV.dtype), rest], dim=-1)


def causal_attention(
    q_BHTV: Tensor,
    k_BHSV: Tensor,
    v_BHSV: Tensor,
    mask_BS: Tensor | None,
    window: int | None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """Softmax attention of the last T of S positions to themselves and, with a window, to the window - 1 keys before.

    Queries go by blocks that see only the keys in reach: memory and work are linear in T with a window. A query always
    sees itself, so that padding rows stay finite. With documents, T is S.
    """
    T, S = q_BHTV.shape[2], k_BHSV.shape[2]
    if mask_BS is None and documents_BT is None and (window is None or window >= S):
        if T == S:
            return F.scaled_dot_product_attention(q_BHTV, k_BHSV, v_BHSV, is_causal=True)
        if T == 1:
            return F.scaled_dot_product_attention(q_BHTV, k_BHSV, v_BHSV)
    outputs = []
    for start in range(S - T, S, ATTENTION_BLOCK_TOKENS):
        end = min(start + ATTENTION_BLOCK_TOKENS, S)
        first = 0 if window is None else max(start - window + 1, 0)
        age = torch.arange(start, end, device=q_BHTV.device)[:, None] - torch.arange(first, end, device=q_BHTV.device)
        seen = (age >= 0) if window is None else (age >= 0) & (age < window)
        if documents_BT is not None:
            seen = seen & (documents_BT[:, None, start:end, None] == documents_BT[:, None, None, first:end])
        if mask_BS is not None:
            seen = seen & mask_BS[:, None, None, first:end] | (age == 0)
        q, k, v = q_BHTV[:, :, start - S + T : end - S + T], k_BHSV[:, :, first:end], v_BHSV[:, :, first:end]
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
    return torch.cat(outputs, dim=2)


class BasedAttention(nn.Module):
    """Softmax attention with rotary positions, over a window of previous keys or over all of them."""

    keeps_documents_apart = True

    def __init__(self, config: BasedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        self.window = config.sliding_window if config.mixers[layer_idx] == "sliding_attention" else None
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = BasedOutput(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        mask_BS: Tensor | None,
        cache: Cache | None,
        rotary: tuple[Tensor, Tensor],
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        q, k, v = (_split_heads(proj(x_BTD), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if mask_BS is not None:  # the cache of a window holds its last keys only
            mask_BS = mask_BS[:, -k.shape[2] :]
        y_BHTV = None
        if mask_BS is None and self.window is not None:
            y_BHTV = fast_window(q, k, v, self.window, documents_BT, causal_attention)
        if y_BHTV is None:
            y_BHTV = causal_attention(q, k, v, mask_BS, self.window, documents_BT)
        return self.o_proj(_merge_heads(y_BHTV))


MIXERS = {
    "conv": BasedGatedConv,
    "linear_attention": BasedLinearAttention,
    "sliding_attention": BasedAttention,
    "full_attention": BasedAttention,
}
