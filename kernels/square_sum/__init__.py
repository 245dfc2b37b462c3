"""The sum of squares of a flat tensor, or of stretches of it: what gradient norms are made of.

Legend: N elements, S stretches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from based_megatron.kernels.backend import implementation
from based_megatron.kernels.square_sum import reference

__all__ = ["square_sum", "stretches"]

LONGEST = 16384
"""Elements of a stretch at most: what one program of the kernel reads."""


def square_sum(x_N: Tensor, stretches_S2: Tensor, *, backend: str = "reference") -> Tensor:
    """The sum of the squares of all elements in the stretches, each of which counts as often as it is in one.

    Args:
        x_N: any float dtype.
        stretches_S2: first element and the one after the last of each stretch, as `stretches` makes them, on the device of x.
        backend: a name from `resolve_backend`.

    Returns: an fp64 scalar on the device; the same bits in every run. Squares within a stretch are summed in fp32 at least.

    >>> x_N = torch.arange(6.0)
    >>> square_sum(x_N, stretches([(1, 3), (5, 6)]))
    tensor(30., dtype=torch.float64)
    """
    run = implementation("square_sum", backend, {"reference": reference.square_sum, "triton": _triton})
    return run(x_N, stretches_S2)


def stretches(ranges: Iterable[tuple[int, int]], device: torch.device | str = "cpu") -> Tensor:
    """Ranges [first, end) of a flat tensor, cut into stretches that are short enough for one program each: int64 [S, 2].

    Ranges that touch are joined first.

    >>> stretches([(0, 5), (5, 9), (12, 12)]).tolist()
    [[0, 9]]
    """
    joined: list[list[int]] = []
    for first, end in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1][1] = max(end, joined[-1][1])
        elif first < end:
            joined.append([first, end])
    cut = [(at, min(at + LONGEST, end)) for first, end in joined for at in range(first, end, LONGEST)]
    return torch.tensor(cut, dtype=torch.int64, device=device).view(-1, 2)


def _triton(*args: Any) -> Tensor:
    from based_megatron.kernels.square_sum import triton_square_sum

    return triton_square_sum.square_sum(*args)
