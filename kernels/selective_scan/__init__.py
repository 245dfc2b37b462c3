"""The selective scan of Mamba (arXiv 2312.00752): N states a channel, with decays and inputs that depend on the token.

Legend: B batch, T tokens, C channels, N states of a channel.

    step_t = softplus(raw_t + bias),   h_t = exp(step_t rate) h_{t-1} + step_t x_t b_t
    y_t = (sum_n c_tn h_tn + skip x_t) silu(gate_t)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.selective_scan import reference

__all__ = ["selective_scan"]


def selective_scan(
    x_BTC: Tensor,
    raw_step_BTC: Tensor,
    rate_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    gate_BTC: Tensor,
    *,
    step_bias_C: Tensor,
    skip_C: Tensor,
    initial_state_BCN: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """(y [B, T, C] in the dtype of x, the state [B, C, N] after the last token in fp32 or wider).

    Args:
        x_BTC: inputs.
        raw_step_BTC, step_bias_C: step sizes are the softplus of their sum.
        rate_CN: rates of decay, at most 0, fp32 or wider.
        b_BTN, c_BTN: how a token enters the states, and how it reads them; the same for all channels.
        gate_BTC, skip_C: what outputs are multiplied by, after a silu, and what share of the inputs they have.
        initial_state_BCN: the state before the first token, which its document goes on from; zero if None.
        document_ids_BT: ids that change where documents begin: there the state is zero. None: one document a row.
        backend: a name from `resolve_backend`. The Triton kernels compute in fp32; fp64 runs in the reference.

    Returns: gradients flow to all but the ids, from both outputs.

    >>> x_BTC, raw_step_BTC, gate_BTC = torch.randn(3, 2, 5, 6).unbind()
    >>> rate_CN, (b_BTN, c_BTN) = -torch.rand(6, 3), torch.randn(2, 2, 5, 3)
    >>> shared = {"step_bias_C": torch.zeros(6), "skip_C": torch.ones(6)}
    >>> y_BTC, state_BCN = selective_scan(x_BTC, raw_step_BTC, rate_CN, b_BTN, c_BTN, gate_BTC, **shared)
    >>> y_BTC.shape, state_BCN.shape
    (torch.Size([2, 5, 6]), torch.Size([2, 6, 3]))
    """
    run = implementation("selective_scan", backend, {"reference": reference.selective_scan, "triton": _triton})
    tokens = (x_BTC, raw_step_BTC, rate_CN, b_BTN, c_BTN, gate_BTC)
    return run(*tokens, step_bias_C, skip_C, initial_state_BCN, document_ids_BT)


def _triton(x_BTC: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    if x_BTC.dtype == torch.float64:
        return reference.selective_scan(x_BTC, *others)
    from based_megatron.kernels.selective_scan import triton_scan  # Triton is there on machines with a GPU only.

    return triton_scan.selective_scan(x_BTC, *others)
