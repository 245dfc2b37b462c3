"""Addition and RMSNorm in one Triton kernel forward and one backward, each a single pass over memory.

Legend: M tokens, D hidden size, P programs of the backward pass.

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

from based_megatron.kernels.triton_overlap import overlapped, wait_for_inputs

PROGRAMS_PER_MULTIPROCESSOR = 4
INTERPRETER_PROGRAMS = 3


@triton.jit
def _forward(
    residual_ptr,
    update_ptr,
    weight_ptr,
    sum_ptr,
    normed_ptr,
    scale_ptr,
    D,
    eps,
    HAS_UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_inputs(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    row = token * D
    r = tl.load(residual_ptr + row + column, mask=inside, other=0.0)
    if HAS_UPDATE:
        r += tl.load(update_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + row + column, r, mask=inside)
    scale = tl.rsqrt(tl.sum(r * r, axis=0) / D + eps)
    tl.store(scale_ptr + token, scale)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row + column, (r * scale * weight).to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dnormed_ptr,
    dsum_ptr,
    sum_ptr,
    scale_ptr,
    weight_ptr,
    dresidual_ptr,
    dupdate_ptr,
    dweight_ptr,
    M,
    D,
    tokens_per_program,
    HAS_DSUM: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    first = program * tokens_per_program
    for token in range(first, min(first + tokens_per_program, M)):
        row = token * D
        scale = tl.load(scale_ptr + token)
        unit = tl.load(sum_ptr + row + column, mask=inside, other=0.0) * scale
        dx = tl.load(dnormed_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        g = dx * weight
        dr = (g - unit * (tl.sum(g * unit, axis=0) / D)) * scale
        if HAS_DSUM:
            dr += tl.load(dsum_ptr + row + column, mask=inside, other=0.0)
        dweight += dx * unit
        tl.store(dresidual_ptr + row + column, dr, mask=inside)
        if HAS_UPDATE:
            tl.store(dupdate_ptr + row + column, dr.to(dupdate_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + program * D + column, dweight, mask=inside)


class AddRMSNorm(torch.autograd.Function):
    """(residual, update or None, weight, eps) to (sum, normed)."""

    @staticmethod
    def forward(
        ctx: Any, residual_MD: Tensor, update_MD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        D = weight_D.numel()
        residual_MD = residual_MD.contiguous()
        update_MD = None if update_MD is None else update_MD.contiguous()
        sum_MD = residual_MD if update_MD is None else torch.empty_like(residual_MD)
        normed_MD = torch.empty_like(residual_MD, dtype=weight_D.dtype)
        scale_M = residual_MD.new_empty(residual_MD.numel() // D)
        block = triton.next_power_of_2(D)
        _forward[(len(scale_M),)](
            residual_MD,
            update_MD,
            weight_D,
            sum_MD,
            normed_MD,
            scale_M,
            D,
            eps,
            HAS_UPDATE=update_MD is not None,
            BLOCK=block,
            num_warps=_warps(block),
            **overlapped(residual_MD.device),
        )
        ctx.save_for_backward(sum_MD, scale_M, weight_D)
        ctx.update_dtype = None if update_MD is None else update_MD.dtype
        ctx.set_materialize_grads(False)
        return sum_MD, normed_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum_MD: Tensor | None, dnormed_MD: Tensor | None) -> tuple[Tensor | None, ...]:
        sum_MD, scale_M, weight_D = ctx.saved_tensors
        D = weight_D.numel()
        dnormed_MD = torch.zeros_like(sum_MD, dtype=weight_D.dtype) if dnormed_MD is None else dnormed_MD.contiguous()
        dsum_MD = None if dsum_MD is None else dsum_MD.contiguous()
        dresidual_MD = torch.empty_like(sum_MD)
        dupdate_MD = None if ctx.update_dtype is None else torch.empty_like(sum_MD, dtype=ctx.update_dtype)
        tokens_per_program = triton.cdiv(len(scale_M), min(len(scale_M), _programs(sum_MD.device)))
        programs = triton.cdiv(len(scale_M), tokens_per_program)
        dweight_PD = sum_MD.new_empty(programs, D)
        block = triton.next_power_of_2(D)
        _backward[(programs,)](
            dnormed_MD,
            dsum_MD,
            sum_MD,
            scale_M,
            weight_D,
            dresidual_MD,
            dupdate_MD,
            dweight_PD,
            len(scale_M),
            D,
            tokens_per_program,
            HAS_DSUM=dsum_MD is not None,
            HAS_UPDATE=dupdate_MD is not None,
            BLOCK=block,
            num_warps=_warps(block),
        )
        return dresidual_MD, dupdate_MD, dweight_PD.sum(0).to(weight_D.dtype), None


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def _warps(block: int) -> int:
    """About 16 elements a thread."""
    return min(16, max(1, block // 512))


def add_rms_norm(residual_MD: Tensor, update_MD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its norm; see the package's function of the same name."""
    assert residual_MD.dtype == torch.float32, residual_MD.dtype
    return AddRMSNorm.apply(residual_MD, update_MD, weight_D, eps)
