"""Addition and RMSNorm in one Triton kernel forward and one backward, each a single pass over memory.

Legend: T tokens, D hidden size.

    r = residual + update,  n = rsqrt(mean(r^2) + eps),  x = r n weight
    g = dx weight,  dr = n (g - r n mean(g r n)) + (gradient of r from later layers),  dweight = sum dx r n

The gradients of residual and update are both dr, the second rounded to the dtype of the update. dweight is summed by each
program over its own tokens, then over programs: the same order in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.kernels.column_sum.triton_column_sum import column_sum
from based_megatron.kernels.fp8 import Fp8Matrix
from based_megatron.kernels.fp8.reference import LARGEST, LEAST_SCALE
from based_megatron.kernels.fp8.tokens import Fp8Tokens, without_memory
from based_megatron.kernels.fp8.triton_fp8 import power_of_two_scale
from based_megatron.kernels.programs import programs_of
from based_megatron.kernels.triton_overlap import overlapped, wait_for_inputs

INTERPRETER_PROGRAMS = 3


@triton.jit
def _forward_kernel(
    residual_ptr, update_ptr, weight_ptr, sum_ptr, normed_ptr, scale_ptr, row_scale_ptr, D, eps,
    HAS_UPDATE: tl.constexpr, TO_E4M3: tl.constexpr, LARGEST: tl.constexpr, LEAST_SCALE: tl.constexpr,
    PADDED_D: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program: one token, whose norm is cast to e4m3 under a scale of its own, or to the type of the output."""
    wait_for_inputs(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PADDED_D)
    inside = d < D
    row = token * D
    r = tl.load(residual_ptr + row + d, mask=inside, other=0.0)
    if HAS_UPDATE:
        r += tl.load(update_ptr + row + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + row + d, r, mask=inside)
    scale = tl.rsqrt(tl.sum(r * r, axis=0) / D + eps)
    tl.store(scale_ptr + token, scale)
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    normed = r * scale * weight
    if TO_E4M3:
        row_scale = power_of_two_scale(tl.max(tl.abs(normed), axis=0), LARGEST, LEAST_SCALE)
        tl.store(row_scale_ptr + token, row_scale)
        normed *= 1 / row_scale
    tl.store(normed_ptr + row + d, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dnormed_ptr, dsum_ptr, sum_ptr, scale_ptr, weight_ptr, dresidual_ptr, dupdate_ptr, partial_dweight_ptr, T, D, tokens_per_program,
    HAS_DSUM: tl.constexpr, HAS_UPDATE: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    """One program: some tokens after each other, and their part of dweight."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PADDED_D)
    inside = d < D
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([PADDED_D], dtype=tl.float32)
    first = program * tokens_per_program
    for token in range(first, min(first + tokens_per_program, T)):
        row = token * D
        scale = tl.load(scale_ptr + token)
        unit = tl.load(sum_ptr + row + d, mask=inside, other=0.0) * scale
        dx = tl.load(dnormed_ptr + row + d, mask=inside, other=0.0).to(tl.float32)
        g = dx * weight
        dr = (g - unit * (tl.sum(g * unit, axis=0) / D)) * scale
        if HAS_DSUM:
            dr += tl.load(dsum_ptr + row + d, mask=inside, other=0.0)
        dweight += dx * unit
        tl.store(dresidual_ptr + row + d, dr, mask=inside)
        if HAS_UPDATE:
            tl.store(dupdate_ptr + row + d, dr.to(dupdate_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_dweight_ptr + program * D + d, dweight, mask=inside)


class AddRMSNorm(torch.autograd.Function):
    """(residual, update or None, weight, eps) to (sum, normed)."""

    @staticmethod
    def run(
        ctx: Any, residual_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum, norm and, in e4m3, its scales."""
        D = weight_D.numel()
        residual_TD = residual_TD.contiguous()
        update_TD = None if update_TD is None else update_TD.contiguous()
        sum_TD = residual_TD if update_TD is None else torch.empty_like(residual_TD)
        normed_TD = torch.empty_like(residual_TD, dtype=dtype)
        scale_T, row_scale_T = residual_TD.new_empty(2, residual_TD.numel() // D)
        padded_D = triton.next_power_of_2(D)
        _forward_kernel[(len(scale_T),)](
            residual_TD,
            update_TD,
            weight_D,
            sum_TD,
            normed_TD,
            scale_T,
            row_scale_T,
            D,
            eps,
            HAS_UPDATE=update_TD is not None,
            TO_E4M3=dtype == torch.float8_e4m3fn,
            LARGEST=LARGEST,
            LEAST_SCALE=LEAST_SCALE,
            PADDED_D=padded_D,
            num_warps=_warps(padded_D),
            **overlapped(residual_TD.device),
        )
        ctx.save_for_backward(sum_TD, scale_T, weight_D)
        ctx.update_dtype = None if update_TD is None else update_TD.dtype
        ctx.set_materialize_grads(False)
        return sum_TD, normed_TD, row_scale_T

    @staticmethod
    def forward(
        ctx: Any, residual_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        return AddRMSNorm.run(ctx, residual_TD, update_TD, weight_D, eps, weight_D.dtype)[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum_TD: Tensor | None, dnormed_TD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        sum_TD, scale_T, weight_D = ctx.saved_tensors
        D = weight_D.numel()
        dnormed_TD = torch.zeros_like(sum_TD, dtype=weight_D.dtype) if dnormed_TD is None else dnormed_TD.contiguous()
        dsum_TD = None if dsum_TD is None else dsum_TD.contiguous()
        dresidual_TD = torch.empty_like(sum_TD)
        dupdate_TD = None if ctx.update_dtype is None else torch.empty_like(sum_TD, dtype=ctx.update_dtype)
        tokens_per_program = triton.cdiv(
            len(scale_T), min(len(scale_T), programs_of(sum_TD.device, INTERPRETER_PROGRAMS))
        )
        programs = triton.cdiv(len(scale_T), tokens_per_program)
        partial_dweight = sum_TD.new_empty(programs, D)
        padded_D = triton.next_power_of_2(D)
        _backward_kernel[(programs,)](
            dnormed_TD,
            dsum_TD,
            sum_TD,
            scale_T,
            weight_D,
            dresidual_TD,
            dupdate_TD,
            partial_dweight,
            len(scale_T),
            D,
            tokens_per_program,
            HAS_DSUM=dsum_TD is not None,
            HAS_UPDATE=dupdate_TD is not None,
            PADDED_D=padded_D,
            num_warps=_warps(padded_D),
        )
        dweight_D = column_sum(partial_dweight, torch.empty_like(weight_D), adds=False)
        return dresidual_TD, dupdate_TD, dweight_D, None


class AddRMSNormRows(AddRMSNorm):
    """(residual, update or None, weight, eps) to (sum, stand-in of the norm, its numbers, their scales)."""

    @staticmethod
    def forward(
        ctx: Any, residual_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        dtype = torch.float8_e4m3fn
        sum_TD, numbers_TD, row_scale_T = AddRMSNorm.run(ctx, residual_TD, update_TD, weight_D, eps, dtype)
        numbers_TD = numbers_TD.flatten(0, -2)
        ctx.mark_non_differentiable(numbers_TD, row_scale_T)
        return sum_TD, without_memory(sum_TD.shape, weight_D), numbers_TD, row_scale_T


def _warps(padded_D: int) -> int:
    """About 16 elements a thread."""
    return min(16, max(1, padded_D // 512))


def add_rms_norm(residual_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm; see the package's function of this name."""
    assert residual_TD.dtype == torch.float32, residual_TD.dtype
    return AddRMSNorm.apply(residual_TD, update_TD, weight_D, eps)


def add_rms_norm_rows(
    residual_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Fp8Tokens]:
    """The sum and its norm in e4m3; see the package's function of this name."""
    assert residual_TD.dtype == torch.float32, residual_TD.dtype
    sum_TD, stand_in, *rows = AddRMSNormRows.apply(residual_TD, update_TD, weight_D, eps)
    return sum_TD, Fp8Tokens(stand_in, Fp8Matrix(*rows))
