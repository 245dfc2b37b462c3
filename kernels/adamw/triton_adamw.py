"""AdamW in Triton: each number is read once and written once.

Legend: N elements.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 1024


@triton.jit
def _update_kernel(
    master_ptr, gradient_ptr, mean_ptr, square_ptr, weight_ptr, scale_ptr, good_ptr, N,
    keep, beta1, new1, beta2, new2, step_size, root_correction, eps,
    HAS_WEIGHT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_GOOD: tl.constexpr, TILE_ELEMENTS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of elements. Divisions and roots are rounded as IEEE has it, as torch's are."""
    n = tl.program_id(0).to(tl.int64) * TILE_ELEMENTS + tl.arange(0, TILE_ELEMENTS)
    if HAS_GOOD:
        N = tl.where(tl.load(good_ptr) != 0, N, 0)
    inside = n < N
    g = tl.load(gradient_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        g *= tl.load(scale_ptr)
    mean = beta1 * tl.load(mean_ptr + n, mask=inside, other=0.0) + new1 * g
    square = beta2 * tl.load(square_ptr + n, mask=inside, other=0.0) + new2 * g * g
    root = tl.math.div_rn(tl.math.sqrt_rn(square), root_correction) + eps
    master = keep * tl.load(master_ptr + n, mask=inside, other=0.0) - step_size * tl.math.div_rn(mean, root)
    tl.store(mean_ptr + n, mean, mask=inside)
    tl.store(square_ptr + n, square, mask=inside)
    tl.store(master_ptr + n, master, mask=inside)
    if HAS_WEIGHT:
        tl.store(weight_ptr + n, master.to(weight_ptr.dtype.element_ty), mask=inside)


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
    tensors = (master_N, gradient_N, mean_N, square_N, *(() if weight_N is None else (weight_N,)))
    assert all(x.is_contiguous() and x.numel() == master_N.numel() for x in tensors), [x.shape for x in tensors]
    _update_kernel[(triton.cdiv(master_N.numel(), TILE_ELEMENTS),)](
        master_N,
        gradient_N,
        mean_N,
        square_N,
        master_N if weight_N is None else weight_N,
        master_N if scale is None else scale,
        master_N if is_good is None else is_good.view(torch.uint8),
        master_N.numel(),
        1 - numbers.lr * numbers.weight_decay,
        numbers.beta1,
        1 - numbers.beta1,
        numbers.beta2,
        1 - numbers.beta2,
        numbers.lr / numbers.first_correction,
        numbers.second_correction**0.5,
        numbers.eps,
        HAS_WEIGHT=weight_N is not None,
        HAS_SCALE=scale is not None,
        HAS_GOOD=is_good is not None,
        TILE_ELEMENTS=TILE_ELEMENTS,
    )
