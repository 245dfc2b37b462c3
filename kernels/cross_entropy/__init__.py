"""Cross entropy over a vocabulary whose columns may be shared out over ranks.

Legend: T tokens, U columns of logits on this rank.
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
    logits_TU: Tensor,
    labels_T: Tensor,
    *,
    columns: int | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "reference",
) -> Tensor:
    """The loss log(sum_u exp(logits_u)) - logits_label of each token, over the columns of all ranks of the group.

    Args:
        logits_TU: fp32, bf16, or fp64, which runs in the reference whatever the backend. Rank r of the group holds columns
            r U .. (r + 1) U - 1 of the vocabulary. The triton backend keeps no fp32 copy: backward writes the gradient over
            the logits, which must not be read after it.
        labels_T: int64, columns of the whole vocabulary.
        columns: how many columns of this rank take part, from its first; the others only pad it. None: all.
        group: ranks that hold the other columns; None: this rank holds all of them.
        backend: a name from `resolve_backend`.

    Returns: loss_T in nats, fp32 (fp64 for fp64 logits). The gradient flows to the logits.

    >>> logits_TU, labels_T = torch.randn(5, 32), torch.randint(0, 30, (5,))
    >>> loss_T = vocab_cross_entropy(logits_TU, labels_T, columns=30)  # the last two columns are padding
    >>> torch.allclose(loss_T, torch.nn.functional.cross_entropy(logits_TU[:, :30], labels_T, reduction="none"))
    True
    """
    assert logits_TU.dim() == 2 and labels_T.shape == logits_TU.shape[:1], (logits_TU.shape, labels_T.shape)
    columns = logits_TU.shape[1] if columns is None else columns
    built = {"reference": reference.vocab_cross_entropy, "triton": _triton}
    return implementation("vocab_cross_entropy", backend, built)(logits_TU, labels_T, columns, group)


def _triton(logits_TU: Tensor, *args: Any) -> Tensor:
    if logits_TU.dtype == torch.float64:
        return reference.vocab_cross_entropy(logits_TU, *args)
    from based_megatron.kernels.cross_entropy import triton_cross_entropy

    return triton_cross_entropy.vocab_cross_entropy(logits_TU, *args)
