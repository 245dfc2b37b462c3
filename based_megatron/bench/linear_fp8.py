"""Rows of linear layers whose products are in 8-bit floats, the casts included.

Legend: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from based_megatron.bench.keys import Baseline, Operation, Sizes
from based_megatron.bench.report import Row
from based_megatron.bench.timing import Bench
from based_megatron.bench.work import Ceilings, Work, measure
from based_megatron.kernels.fp8 import MULTIPLE
from based_megatron.parallel.fp8 import Fp8Product

LAYERS = ((1792, 7168), (3584, 1792), (1792, 5376))
"""Inputs and outputs of based-1b's layers: into and out of MLP and convolution, into the window."""


def linear_rows(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """Layers of based-1b against the same in bf16, whose place they take; none in other types."""
    if bench.dtype != torch.bfloat16:
        return []
    T = bench.size(16384, MULTIPLE)
    layers = [(bench.size(K, 2 * MULTIPLE), bench.size(N, 3 * MULTIPLE)) for K, N in LAYERS[: bench.size(3, 1)]]
    return [row for K, N in layers for row in measure(bench, _work(bench, T, K, N), ceilings())]


def _work(bench: Bench, T: int, K: int, N: int) -> Work:
    narrow = torch.finfo(bench.dtype).bits // 8
    forward = narrow * (T * K + N * K + T * N)
    return Work(
        Operation.FP8_LINEAR,
        Sizes(rows=T, channels=K, columns=N),
        _run,
        lambda: [bench.random(T, K), bench.random(N, K, scale=K**-0.5)],
        cut=lambda x, i: x,
        gradients=("dx", "dW"),
        # Rounding to 3 bits errs by 2.6 % on each side of a product.
        limits={"o": 0.045, "dx": 0.045, "dW": 0.045},
        moved=(forward, 3.0 * forward),
        baselines={Baseline.PYTORCH: lambda *x: (functional.linear, x)},
        note="casts of x, W and dy included",
    )


def _run(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    if x.dtype == torch.float64:
        return functional.linear(x, weight)
    return Fp8Product(weight, backend)(x, weight)
