"""Rows of the kernels between mixers: norm, gate and loss.

Legend: T tokens, D hidden size or width of the gate, U vocabulary columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from based_megatron.bench.keys import Baseline, Operation, Sizes
from based_megatron.bench.report import Row
from based_megatron.bench.timing import Bench
from based_megatron.bench.work import Ceilings, Run, Work, compiled, measure
from based_megatron.kernels.cross_entropy import vocab_cross_entropy
from based_megatron.kernels.rms_norm import add_rms_norm
from based_megatron.kernels.swiglu import swiglu


def norm_rows(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """Addition and norm of based-1b's residual stream: fp32 residual, update and output in the weights' dtype."""
    T, D = bench.size(16384, 12), bench.size(1792, 32)
    narrow = torch.finfo(bench.dtype).bits // 8
    forward = T * D * (4 + narrow + 4 + narrow)
    backward = T * D * (narrow + 4 + 4 + 4 + narrow)

    def inputs() -> list[Tensor]:
        return [bench.random(T, D, dtype=torch.float32), bench.random(T, D), 1 + bench.random(D, scale=0.1)]

    work = Work(
        Operation.ADD_RMS_NORM,
        Sizes(rows=T, hidden=D),
        lambda residual, update, weight, backend: add_rms_norm(residual, update, weight, 1e-5, backend=backend),
        inputs,
        cut=lambda x, i: x,
        gradients=("dresidual", "dupdate", "dweight"),
        limits={"o": 3e-3, "dresidual": 4e-3, "dupdate": 4e-3, "dweight": 4e-3},
        moved=(forward, forward + backward),
        baselines={
            Baseline.PYTORCH: lambda *x: (_plain_norm, x),
            Baseline.COMPILED: lambda *x: (compiled(bench, _plain_norm), x),
            Baseline.LIGER_BF16_RESIDUAL: lambda r, u, w: (_liger_norm(), (u, r.to(u.dtype), w)),
        },
        note="fp32 residual",
    )
    return measure(bench, work, ceilings())


def swiglu_rows(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """The gate of based-1b's MLP."""
    T, D = bench.size(16384, 12), bench.size(3584, 24)
    element = T * D * torch.finfo(bench.dtype).bits // 8
    work = Work(
        Operation.SWIGLU,
        Sizes(rows=T, width=D),
        lambda x, backend: swiglu(x, backend=backend),
        lambda: [bench.random(T, 2 * D)],
        cut=lambda x, i: x,
        gradients=("dx",),
        limits={"o": 4e-3, "dx": 4e-3},
        moved=(3.0 * element, 8.0 * element),
        baselines={
            Baseline.PYTORCH: lambda x: (swiglu, (x,)),
            Baseline.COMPILED: lambda x: (compiled(bench, swiglu), (x,)),
            Baseline.LIGER_HALVES_SWAPPED: lambda x: (_liger_swiglu(), (x,)),
        },
    )
    return measure(bench, work, ceilings())


def cross_entropy_rows(bench: Bench, ceilings: Callable[[], Ceilings]) -> list[Row]:
    """Cross entropy over the vocabulary of based-1b on one rank; the gradient is written over the logits, so each call works on a copy."""
    T, U = bench.size(16384, 12), bench.size(50264, 91)
    element = T * U * torch.finfo(bench.dtype).bits // 8
    tokens = min(T, 256)

    def inputs() -> list[Tensor]:
        return [bench.random(T, U), torch.randint(0, U, (T,), device=bench.device)]

    def run(logits: Tensor, labels: Tensor, backend: str) -> Tensor:
        # A copy as in a model, where the logits are an intermediate value.
        return vocab_cross_entropy(logits.clone(), labels, backend=backend)

    work = Work(
        Operation.CROSS_ENTROPY,
        Sizes(rows=T, columns=U),
        run,
        inputs,
        cut=lambda x, i: x[:tokens],
        gradients=("dlogits",),
        limits={"o": 3e-3, "dlogits": 4e-3},
        moved=(3.0 * element, 5.0 * element),
        baselines={
            Baseline.PYTORCH: lambda *x: (functools.partial(run, backend="reference"), x),
            Baseline.COMPILED: lambda *x: (compiled(bench, _plain_cross_entropy), x),
            Baseline.LIGER: lambda *x: (_liger_cross_entropy(), x),
        },
        note="with a copy of the logits",
    )
    return measure(bench, work, ceilings())


def _plain_norm(residual: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm(residual, update, weight, 1e-5)


def _plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.clone().float(), labels, reduction="none")


def _liger_norm() -> Run:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(x, residual, weight, 1e-5)


def _liger_swiglu() -> Run:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return LigerFusedGateUpSiLUMulFunction.apply


def _liger_cross_entropy() -> Run:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, labels: liger_cross_entropy(logits.clone(), labels, reduction="none")
