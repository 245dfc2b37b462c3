"""The selective scan in plain PyTorch: a loop over tokens, whose backward goes through the tokens of a chunk once more.

Legend: B batch, T tokens, C channels, N states of a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 64
"""States are kept at every so many tokens; those between are computed again in backward."""


def selective_scan(
    x_BTC: Tensor,
    raw_step_BTC: Tensor,
    rate_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    gate_BTC: Tensor,
    step_bias_C: Tensor,
    skip_C: Tensor,
    initial_state_BCN: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the last state; see the package's function of this name."""
    (B, T, C), N = x_BTC.shape, rate_CN.shape[1]
    dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    state = x_BTC.new_zeros(B, C, N, dtype=dtype) if initial_state_BCN is None else initial_state_BCN.to(dtype)
    x, b, c, rate, gate = (part.to(dtype) for part in (x_BTC, b_BTN, c_BTN, rate_CN, gate_BTC))
    step = functional.softplus(raw_step_BTC.to(dtype) + step_bias_C.to(dtype))
    keep_BT = torch.ones(B, T, dtype=dtype, device=x_BTC.device)
    if document_ids_BT is not None:
        keep_BT[:, 1:] = (document_ids_BT[:, 1:] == document_ids_BT[:, :-1]).to(dtype)
    outputs = []
    for first in range(0, T, CHUNK_TOKENS):
        chunk = slice(first, first + CHUNK_TOKENS)
        parts = [part[:, chunk] for part in (x, step, b, c, keep_BT)]
        y, state = checkpoint(_scan_chunk, state, rate, *parts, use_reentrant=False, preserve_rng_state=False)
        outputs.append(y)
    y_BTC = torch.cat(outputs, dim=1) + skip_C.to(dtype) * x
    return (y_BTC * functional.silu(gate)).to(x_BTC.dtype), state


def _scan_chunk(state_BCN: Tensor, rate_CN: Tensor, x: Tensor, step: Tensor, b: Tensor, c: Tensor, keep: Tensor):
    outputs = []
    for t in range(x.shape[1]):
        # A decay of 0 forgets the state: a document begins.
        decay_BCN = (step[:, t, :, None] * rate_CN).exp() * keep[:, t, None, None]
        state_BCN = decay_BCN * state_BCN + (step[:, t] * x[:, t])[..., None] * b[:, t, None]
        outputs.append(torch.einsum("bcn,bn->bc", state_BCN, c[:, t]))
    return torch.stack(outputs, dim=1), state_BCN
