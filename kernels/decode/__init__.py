"""Decoding: one more token through each mixer, with a state of constant size.

Legend: B batch, H heads, F feature dim, V value head dim, W window_left, P rotated pairs, D channels, K taps,
C vocabulary rows.

States (see states.py) are updated in place and nothing waits for the host, so that a whole step can be a CUDA graph. There are
no gradients. Inputs may be views with any stride but that of the last dim, such as parts of a fused projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.decode import reference
from based_megatron.kernels.decode.states import WAITING_KEYS, ConvState, TaylorState, WindowState

__all__ = [
    "WAITING_KEYS",
    "ConvState",
    "TaylorState",
    "WindowState",
    "choose_token",
    "conv_step",
    "taylor_step",
    "window_step",
]


def taylor_step(
    q_BHF: Tensor, k_BHF: Tensor, v_BHV: Tensor, state: TaylorState, *, backend: str = "reference"
) -> Tensor:
    """Append (k, v) to the state, then attend with q: `taylor_attention` at the next position.

    Returns: o_BHV in the dtype of v. The kernel reads the moments once, and writes them in one of 16 steps.
    """
    return _run("taylor_step", backend)(q_BHF, k_BHF, v_BHV, state)


def window_step(
    q_BHV: Tensor,
    k_BHV: Tensor,
    v_BHV: Tensor,
    cos_BP: Tensor,
    sin_BP: Tensor,
    state: WindowState,
    position_B: Tensor,
    *,
    backend: str = "reference",
) -> Tensor:
    """Rotate q and k, store k and v, and attend to the own key and the W before it: `sliding_window_attention` at `position`.

    Args:
        q_BHV, k_BHV, v_BHV: before rotation.
        cos_BP, sin_BP: `rotary_tables` of the positions, fp32 or wider.
        position_B: int64 on the device, how many tokens each row has absorbed; slots that were never written are not read.

    Returns: o_BHV in the dtype of v.
    """
    return _run("window_step", backend)(q_BHV, k_BHV, v_BHV, cos_BP, sin_BP, state, position_B)


def conv_step(
    u_BD: Tensor, gate_BD: Tensor, weight_DK: Tensor, state: ConvState, *, backend: str = "reference"
) -> Tensor:
    """silu(sum_k weight[:, k] * u_{t-(K-1)+k}) * gate_t: `gated_conv` at the next position. Returns y_BD in the dtype of u."""
    return _run("conv_step", backend)(u_BD, gate_BD, weight_DK, state)


def choose_token(logits_BC: Tensor, vocab_size: int, token_B: Tensor, *, backend: str = "reference") -> None:
    """Put the most likely of the first `vocab_size` tokens into token_B, int64; the kernel takes the first of equals."""
    _run("choose_token", backend)(logits_BC, vocab_size, token_B)


def _run(op: str, backend: str) -> Callable[..., Any]:
    built = {"reference": getattr(reference, op)}
    if backend == "triton":
        from based_megatron.kernels.decode import triton_decode

        built["triton"] = getattr(triton_decode, op)
    return implementation(op, backend, built)
