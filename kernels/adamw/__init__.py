"""The update of AdamW over flat tensors, with what stands around it: the clipped gradient before, rounded weights after.

Legend: N elements.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from based_megatron.kernels.adamw import reference
from based_megatron.kernels.backend import implementation

__all__ = ["AdamW", "adamw"]


class AdamW(NamedTuple):
    """The numbers of one update.

    >>> AdamW(lr=0.1, step=1).first_correction
    0.09999999999999998
    """

    lr: float
    step: int
    """The number of this update, from 1: averages of few gradients are corrected for the zeros that they began with."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0

    @property
    def first_correction(self) -> float:
        """What the first moment is divided by."""
        return 1 - self.beta1**self.step

    @property
    def second_correction(self) -> float:
        """What the second moment is divided by."""
        return 1 - self.beta2**self.step


def adamw(
    numbers: AdamW,
    master_N: Tensor,
    gradient_N: Tensor,
    mean_N: Tensor,
    square_N: Tensor,
    *,
    weight_N: Tensor | None = None,
    scale: Tensor | None = None,
    is_good: Tensor | None = None,
    backend: str = "reference",
) -> None:
    """Update masters and moments in place, in one pass over memory:

        g = scale gradient,  mean = beta1 mean + (1 - beta1) g,  square = beta2 square + (1 - beta2) g^2
        master = (1 - lr weight_decay) master - lr / first_correction mean / (sqrt(square / second_correction) + eps)

    Args:
        numbers: of this update.
        master_N, mean_N, square_N: the weights and their moments, fp32 (or fp64, in the reference), updated.
        gradient_N: read only, also where it is scaled.
        weight_N: takes the new masters in its own dtype.
        scale: a scalar on the device; 1 if there is none.
        is_good: a bool on the device; if it is false nothing is written, and nobody waits to know it.
        backend: a name from `resolve_backend`.

    >>> master_N, mean_N, square_N = torch.ones(2), torch.zeros(2), torch.zeros(2)
    >>> adamw(AdamW(lr=0.1, step=1), master_N, torch.tensor([3.0, -3.0]), mean_N, square_N)
    >>> master_N
    tensor([0.9000, 1.1000])
    """
    run = implementation("adamw", backend, {"reference": reference.adamw, "triton": _triton})
    with torch.no_grad():
        run(numbers, master_N, gradient_N, mean_N, square_N, weight_N, scale, is_good)


def _triton(*args: Any) -> None:
    from based_megatron.kernels.adamw import triton_adamw

    triton_adamw.adamw(*args)
