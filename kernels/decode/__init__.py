"""Decoding steps: one more token through each mixer, with a state of constant size.

Legend: B batch, H heads, F feature dim, V value head dim, W window_left, R rotated pairs, D channels, K taps,
U columns of the vocabulary.

States (see states.py) are updated in place and nothing waits for the host, so that a whole step can be a CUDA graph. There are
no gradients. Inputs may be views with any stride but that of the last dim, such as parts of a fused projection.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.decode import reference
from based_megatron.kernels.decode.states import BUFFERED_KEYS, ConvState, TaylorState, WindowState

__all__ = [
    "BUFFERED_KEYS",
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
    """Output of `taylor_attention` at the next position, whose (k, v) the state takes in first.

    Returns: o_BHV in the dtype of v; of a state of squares, as with `square` there. The kernel reads the moments once, and writes
    them in one of 16 steps.

    >>> state = TaylorState.zeros(2, 3, 4, 8, dtype=torch.float32, device=torch.device("cpu"))
    >>> q_BHF, k_BHF, v_BHV = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 8)
    >>> o_BHV = taylor_step(q_BHF, k_BHF, v_BHV, state)
    >>> torch.allclose(o_BHV, v_BHV)  # the first token sees itself alone
    True
    """
    run = implementation("taylor_step", backend, {"reference": reference.taylor_step, "triton": _triton_taylor})
    return run(q_BHF, k_BHF, v_BHV, state)


def window_step(
    q_BHV: Tensor,
    k_BHV: Tensor,
    v_BHV: Tensor,
    cos_BR: Tensor,
    sin_BR: Tensor,
    state: WindowState,
    position_B: Tensor,
    *,
    backend: str = "reference",
) -> Tensor:
    """Output of `sliding_window_attention` at `position`, whose rotated key and value the state takes in first.

    Args:
        q_BHV, k_BHV, v_BHV: before rotation.
        cos_BR, sin_BR: `rotary_tables` of the positions, fp32 or wider.
        position_B: int64 on the device, how many tokens each row has absorbed; slots that were never written are not read.

    Returns: o_BHV in the dtype of v.

    >>> from based_megatron.kernels.rotary import rotary_tables
    >>> state = WindowState.zeros(2, 3, 16, 8, dtype=torch.float32, device=torch.device("cpu"))
    >>> position_B = torch.zeros(2, dtype=torch.int64)
    >>> cos_BR, sin_BR = rotary_tables(position_B, head_dim=8, fraction=0.5, base=10_000.0)
    >>> q_BHV, k_BHV, v_BHV = torch.randn(3, 2, 3, 8)
    >>> o_BHV = window_step(q_BHV, k_BHV, v_BHV, cos_BR, sin_BR, state, position_B)
    >>> torch.allclose(o_BHV, v_BHV)
    True
    """
    run = implementation("window_step", backend, {"reference": reference.window_step, "triton": _triton_window})
    return run(q_BHV, k_BHV, v_BHV, cos_BR, sin_BR, state, position_B)


def conv_step(
    u_BD: Tensor, gate_BD: Tensor, weight_DK: Tensor, state: ConvState, *, backend: str = "reference"
) -> Tensor:
    """Output of `gated_conv` at the next position, silu(sum_k weight[:, k] * u_{t-(K-1)+k}) * gate_t; the state takes u in.

    Returns: y_BD in the dtype of u.

    >>> state = ConvState.zeros(2, taps=3, channels=8, dtype=torch.float32, device=torch.device("cpu"))
    >>> u_BD, gate_BD, weight_DK = torch.randn(2, 8), torch.randn(2, 8), torch.randn(8, 3)
    >>> y_BD = conv_step(u_BD, gate_BD, weight_DK, state)
    >>> torch.allclose(y_BD, torch.nn.functional.silu(u_BD * weight_DK[:, 2]) * gate_BD)
    True
    """
    run = implementation("conv_step", backend, {"reference": reference.conv_step, "triton": _triton_conv})
    return run(u_BD, gate_BD, weight_DK, state)


def choose_token(logits_BU: Tensor, vocab_size: int, token_B: Tensor, *, backend: str = "reference") -> None:
    """Put the most likely of the first `vocab_size` tokens into token_B, int64; the kernel takes the first of equals.

    >>> token_B = torch.empty(2, dtype=torch.int64)
    >>> choose_token(torch.tensor([[0.0, 3.0, 1.0, 9.0], [2.0, 1.0, 0.0, 9.0]]), 3, token_B)  # the last column is padding
    >>> token_B
    tensor([1, 0])
    """
    run = implementation("choose_token", backend, {"reference": reference.choose_token, "triton": _triton_token})
    run(logits_BU, vocab_size, token_B)


# Triton is there on machines with a GPU only.


def _triton_taylor(*args: Any) -> Tensor:
    from based_megatron.kernels.decode import triton_taylor_step

    return triton_taylor_step.taylor_step(*args)


def _triton_window(*args: Any) -> Tensor:
    from based_megatron.kernels.decode import triton_decode

    return triton_decode.window_step(*args)


def _triton_conv(*args: Any) -> Tensor:
    from based_megatron.kernels.decode import triton_decode

    return triton_decode.conv_step(*args)


def _triton_token(*args: Any) -> None:
    from based_megatron.kernels.decode import triton_decode

    triton_decode.choose_token(*args)
