"""The selective scan of Mamba (arXiv 2312.00752): N states a channel, with decays and inputs that depend on the token.

Legend: B batch, T tokens, C channels, N states of a channel.

    h_t = exp(step_t rate) h_{t-1} + step_t x_t b_t,   y_t = sum_n c_tn h_tn
"""

from __future__ import annotations

import torch
from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.selective_scan import reference

__all__ = ["selective_scan"]


def selective_scan(
    x_BTC: Tensor,
    step_BTC: Tensor,
    rate_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    *,
    initial_state_BCN: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """(y [B, T, C] in the dtype of x, the state [B, C, N] after the last token in fp32 or wider).

    Args:
        x_BTC: inputs.
        step_BTC: step sizes, at least 0.
        rate_CN: rates of decay, at most 0, fp32 or wider.
        b_BTN, c_BTN: how a token enters the states, and how it reads them; the same for all channels.
        initial_state_BCN: the state before the first token, which its document goes on from; zero if None.
        document_ids_BT: ids that change where documents begin: there the state is zero. None: one document a row.
        backend: a name from `resolve_backend`. The Triton kernel computes in fp32; fp64 runs in the reference.

    Returns: gradients flow to all but the ids, from both outputs.

    >>> x_BTC, step_BTC, (b_BTN, c_BTN) = torch.randn(2, 5, 6), torch.rand(2, 5, 6), torch.randn(2, 2, 5, 3)
    >>> y_BTC, state_BCN = selective_scan(x_BTC, step_BTC, -torch.rand(6, 3), b_BTN, c_BTN)
    >>> y_BTC.shape, state_BCN.shape
    (torch.Size([2, 5, 6]), torch.Size([2, 6, 3]))
    """
    run = implementation("selective_scan", backend, {"reference": reference.selective_scan, "triton": _triton})
    return run(x_BTC, step_BTC, rate_CN, b_BTN, c_BTN, initial_state_BCN, document_ids_BT)


def _triton(x_BTC: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    if x_BTC.dtype == torch.float64:
        return reference.selective_scan(x_BTC, *others)  # type: ignore[arg-type]
    from based_megatron.kernels.selective_scan import triton_scan  # Triton is there on machines with a GPU only.

    return triton_scan.selective_scan(x_BTC, *others)  # type: ignore[arg-type]
