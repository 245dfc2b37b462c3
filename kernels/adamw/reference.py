"""AdamW in plain PyTorch, as torch's own computes it.

Legend: N elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def adamw(
    numbers: Any,
    master_N: Tensor,
    gradient_N: Tensor,
    mean_N: Tensor,
    square_N: Tensor,
    weight_N: Tensor | None,
    scale: Tensor | None,
    is_good: Tensor | None,
) -> None:
    """The update; see the package's function of this name."""
    g_N = gradient_N if scale is None else gradient_N * scale
    mean = torch.lerp(mean_N, g_N, 1 - numbers.beta1)
    square = (square_N * numbers.beta2).addcmul_(g_N, g_N, value=1 - numbers.beta2)
    root = (square.sqrt() / numbers.second_correction**0.5).add_(numbers.eps)
    decayed = master_N * (1 - numbers.lr * numbers.weight_decay)
    master = decayed.addcdiv_(mean, root, value=-numbers.lr / numbers.first_correction)
    for held, new in ((master_N, master), (mean_N, mean), (square_N, square)):
        held.copy_(new if is_good is None else torch.where(is_good, new, held))
    if weight_N is not None:
        weight_N.copy_(master_N if is_good is None else torch.where(is_good, master_N.to(weight_N.dtype), weight_N))
