"""Cross entropy over a vocabulary whose columns may be cut over ranks.

Legend: N tokens, C columns of logits on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.cross_entropy import reference

__all__ = ["vocab_cross_entropy"]


def vocab_cross_entropy(
    logits_NC: Tensor,
    labels_N: Tensor,
    *,
    columns: int | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "reference",
) -> Tensor:
    """log(sum_c exp(logits_c)) - logits_label of each token, over the columns of all ranks of the group.

    Args:
        logits_NC: fp32, bf16, or fp64, which runs in the reference whatever the backend. Rank r of the group holds columns
            r C .. (r + 1) C - 1 of the vocabulary. The triton backend keeps no fp32 copy: backward writes the gradient over
            the logits, which nobody else may read after it.
        labels_N: int64, columns of the whole vocabulary.
        columns: how many columns of this rank take part, from its first; the others only pad it. None: all.
        group: ranks that hold the other columns; None: this rank holds all of them.
        backend: a name from `resolve_backend`.

    Returns: loss_N in nats, fp32 (fp64 for fp64 logits). The gradient flows to the logits.
    """
    assert logits_NC.dim() == 2 and labels_N.shape == logits_NC.shape[:1], (logits_NC.shape, labels_N.shape)
    columns = logits_NC.shape[1] if columns is None else columns
    built = {"reference": reference.vocab_cross_entropy, "triton": _triton}
    return implementation("vocab_cross_entropy", backend, built)(logits_NC, labels_N, columns, group)


def _triton(logits_NC: Tensor, *args: Any) -> Tensor:
    if logits_NC.dtype == torch.float64:
        return reference.vocab_cross_entropy(logits_NC, *args)
    from based_megatron.kernels.cross_entropy import triton_cross_entropy

    return triton_cross_entropy.vocab_cross_entropy(logits_NC, *args)
