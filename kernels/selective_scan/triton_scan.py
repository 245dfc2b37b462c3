"""The selective scan in Triton: a program walks over the tokens of a row with the states of some channels in registers.

Legend: B batch, T tokens, C channels, N states of a channel, S saved states of a row, one before each chunk.

Backward walks over the chunks from the last to the first. It computes the states of a chunk again from the one saved before it,
writes them to a buffer that only this program uses, and reads them from the last token to the first:

    dh_t = c_t dy_t + a_{t+1} dh_{t+1},   a_t = exp(step_t rate), or 0 where a document begins
    dx_t = step_t (dh_t b_t),   dc_t = sum over channels of h_t dy_t,   db_t = sum over channels of step_t x_t dh_t
    dstep_t = x_t (dh_t b_t) + sum_n rate a_t h_{t-1} dh_t,   drate = sum_t step_t a_t h_{t-1} dh_t
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.kernels.layout import ids_operand, laid_out_like, operand, unit_last_stride

CHUNK_TOKENS = 64
"""Tokens between saved states."""
TILE_CHANNELS = 32
WARPS = 1


@triton.jit
def load_row(x, b, t, columns, size):
    """One token of an operand [B, T, X] in fp32; 0 beyond its size."""
    return tl.load(x.ptr + b * x.stride_b + t * x.stride_t + columns, mask=columns < size, other=0).to(tl.float32)


@triton.jit
def goes_on(ids, b, t, HAS_IDS: tl.constexpr):
    """1 where token t is of the same document as the one before it, else 0. The first token of a row goes on with the initial state."""
    same = 1.0
    if HAS_IDS:
        row_ptr = ids.ptr + b * ids.stride_b
        same = tl.where(tl.load(row_ptr + t) == tl.load(row_ptr + tl.maximum(t - 1, 0)), 1.0, 0.0)
    return same


@triton.jit
def forward_kernel(
    x, step, rate_ptr, b, c, initial_ptr, ids, y, saved_ptr, final_ptr, T, C, N, S,
    HAS_INITIAL: tl.constexpr, HAS_IDS: tl.constexpr, CHUNK_TOKENS: tl.constexpr, TILE_CHANNELS: tl.constexpr, PADDED_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_CHANNELS channels of one row, all tokens in order."""
    row = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    n = tl.arange(0, PADDED_N)
    inside = (channels < C)[:, None] & (n < N)[None, :]
    place = channels[:, None] * N + n[None, :]
    rate = tl.load(rate_ptr + place, mask=inside, other=0)
    h = tl.zeros((TILE_CHANNELS, PADDED_N), tl.float32)
    if HAS_INITIAL:
        h = tl.load(initial_ptr + row * C * N + place, mask=inside, other=0)
    for s in range(S):
        tl.store(saved_ptr + (row * S + s) * C * N + place, h, mask=inside)
        for t in range(s * CHUNK_TOKENS, tl.minimum((s + 1) * CHUNK_TOKENS, T)):
            step_t = load_row(step, row, t, channels, C)
            x_t = load_row(x, row, t, channels, C)
            decay = tl.exp(step_t[:, None] * rate) * goes_on(ids, row, t, HAS_IDS)
            h = decay * h + (step_t * x_t)[:, None] * load_row(b, row, t, n, N)[None, :]
            y_t = tl.sum(h * load_row(c, row, t, n, N)[None, :], axis=1)
            y_ptr = y.ptr + row * y.stride_b + t * y.stride_t + channels
            tl.store(y_ptr, y_t.to(y.ptr.dtype.element_ty), mask=channels < C)
    tl.store(final_ptr + row * C * N + place, h, mask=inside)


@triton.jit
def backward_kernel(
    x, step, rate_ptr, b, c, ids, dy, dfinal_ptr, saved_ptr, chunk_ptr,
    dx, dstep, drate_ptr, db_ptr, dc_ptr, dinitial_ptr, T, C, N, S,
    HAS_IDS: tl.constexpr, CHUNK_TOKENS: tl.constexpr, TILE_CHANNELS: tl.constexpr, PADDED_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_CHANNELS channels of one row, chunks from the last to the first; its sums over channels are partial."""
    row = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    program = row * tl.num_programs(0) + tile
    channels = tile * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    n = tl.arange(0, PADDED_N)
    inside = (channels < C)[:, None] & (n < N)[None, :]
    place = channels[:, None] * N + n[None, :]
    rate = tl.load(rate_ptr + place, mask=inside, other=0)
    dh = tl.load(dfinal_ptr + row * C * N + place, mask=inside, other=0)
    drate = tl.zeros((TILE_CHANNELS, PADDED_N), tl.float32)
    own = tl.arange(0, TILE_CHANNELS)[:, None] * PADDED_N + n[None, :]
    chunk_ptr += program * CHUNK_TOKENS * TILE_CHANNELS * PADDED_N + own
    for back in range(S):
        s = S - 1 - back
        first = s * CHUNK_TOKENS
        tokens = tl.minimum(CHUNK_TOKENS, T - first)
        h = tl.load(saved_ptr + (row * S + s) * C * N + place, mask=inside, other=0)
        for i in range(tokens):
            # The state before each token; a thread reads again what it wrote itself.
            tl.store(chunk_ptr + i * TILE_CHANNELS * PADDED_N, h)
            step_t = load_row(step, row, first + i, channels, C)
            x_t = load_row(x, row, first + i, channels, C)
            decay = tl.exp(step_t[:, None] * rate) * goes_on(ids, row, first + i, HAS_IDS)
            h = decay * h + (step_t * x_t)[:, None] * load_row(b, row, first + i, n, N)[None, :]
        tl.debug_barrier()
        for j in range(tokens):
            i = tokens - 1 - j
            t = first + i
            step_t = load_row(step, row, t, channels, C)
            x_t = load_row(x, row, t, channels, C)
            b_t = load_row(b, row, t, n, N)
            dy_t = load_row(dy, row, t, channels, C)
            before = tl.load(chunk_ptr + i * TILE_CHANNELS * PADDED_N)
            decay = tl.exp(step_t[:, None] * rate) * goes_on(ids, row, t, HAS_IDS)
            h = decay * before + (step_t * x_t)[:, None] * b_t[None, :]
            dh += dy_t[:, None] * load_row(c, row, t, n, N)[None, :]
            partial = (program * T + t) * N + n
            tl.store(dc_ptr + partial, tl.sum(h * dy_t[:, None], axis=0), mask=n < N)
            tl.store(db_ptr + partial, tl.sum(dh * (step_t * x_t)[:, None], axis=0), mask=n < N)
            dh_b = tl.sum(dh * b_t[None, :], axis=1)
            dexponent = dh * decay * before
            drate += dexponent * step_t[:, None]
            dx_ptr = dx.ptr + row * dx.stride_b + t * dx.stride_t + channels
            dstep_ptr = dstep.ptr + row * dstep.stride_b + t * dstep.stride_t + channels
            tl.store(dx_ptr, (step_t * dh_b).to(dx.ptr.dtype.element_ty), mask=channels < C)
            dstep_t = x_t * dh_b + tl.sum(dexponent * rate, axis=1)
            tl.store(dstep_ptr, dstep_t.to(dstep.ptr.dtype.element_ty), mask=channels < C)
            dh = dh * decay
        tl.debug_barrier()
    tl.store(drate_ptr + row * C * N + place, drate, mask=inside)
    tl.store(dinitial_ptr + row * C * N + place, dh, mask=inside)


class SelectiveScan(torch.autograd.Function):
    """(x, step, rate, b, c, initial state or None, ids or None) to (y, last state)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTC: Tensor,
        step_BTC: Tensor,
        rate_CN: Tensor,
        b_BTN: Tensor,
        c_BTN: Tensor,
        initial_BCN: Tensor | None,
        ids_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        (B, T, C), N = x_BTC.shape, rate_CN.shape[1]
        S = triton.cdiv(T, CHUNK_TOKENS)
        saved_BSCN = x_BTC.new_empty(B, S, C, N, dtype=torch.float32)
        final_BCN, y_BTC = saved_BSCN.new_empty(B, C, N), laid_out_like(x_BTC)
        forward_kernel[(triton.cdiv(C, TILE_CHANNELS), B)](
            operand(x_BTC), operand(step_BTC), rate_CN, operand(b_BTN), operand(c_BTN),
            final_BCN if initial_BCN is None else initial_BCN, ids_operand(ids_BT, x_BTC), operand(y_BTC), saved_BSCN, final_BCN,
            T, C, N, S,
            HAS_INITIAL=initial_BCN is not None, HAS_IDS=ids_BT is not None, CHUNK_TOKENS=CHUNK_TOKENS,
            TILE_CHANNELS=TILE_CHANNELS, PADDED_N=triton.next_power_of_2(N), num_warps=WARPS,
        )  # fmt: skip
        ctx.save_for_backward(x_BTC, step_BTC, rate_CN, b_BTN, c_BTN, ids_BT, saved_BSCN)
        ctx.has_initial = initial_BCN is not None
        return y_BTC, final_BCN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTC: Tensor, dfinal_BCN: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, step_BTC, rate_CN, b_BTN, c_BTN, ids_BT, saved_BSCN = ctx.saved_tensors
        (B, T, C), N, S = x_BTC.shape, rate_CN.shape[1], saved_BSCN.shape[1]
        tiles, padded = triton.cdiv(C, TILE_CHANNELS), triton.next_power_of_2(N)
        chunk = saved_BSCN.new_empty(B, tiles, CHUNK_TOKENS, TILE_CHANNELS, padded)
        drate_BCN, dinitial_BCN = saved_BSCN.new_empty(B, C, N), saved_BSCN.new_empty(B, C, N)
        # Sums over the channels of each program, added up below in a fixed order.
        db, dc = saved_BSCN.new_empty(B, tiles, T, N), saved_BSCN.new_empty(B, tiles, T, N)
        dx_BTC, dstep_BTC = laid_out_like(x_BTC), torch.empty_like(step_BTC)
        backward_kernel[(tiles, B)](
            operand(x_BTC), operand(step_BTC), rate_CN, operand(b_BTN), operand(c_BTN), ids_operand(ids_BT, x_BTC),
            operand(unit_last_stride(dy_BTC)), dfinal_BCN.contiguous(), saved_BSCN, chunk,
            operand(dx_BTC), operand(dstep_BTC), drate_BCN, db, dc, dinitial_BCN, T, C, N, S,
            HAS_IDS=ids_BT is not None, CHUNK_TOKENS=CHUNK_TOKENS, TILE_CHANNELS=TILE_CHANNELS, PADDED_N=padded, num_warps=WARPS,
        )  # fmt: skip
        return (
            dx_BTC,
            dstep_BTC,
            drate_BCN.sum(0),
            db.sum(1).to(b_BTN.dtype),
            dc.sum(1).to(c_BTN.dtype),
            dinitial_BCN if ctx.has_initial else None,
            None,
        )


@torch.compiler.disable  # a kernel of ours inside of an autograd function: one call in a compiled graph
def selective_scan(
    x_BTC: Tensor,
    step_BTC: Tensor,
    rate_CN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    initial_state_BCN: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the last state; see the package's function of this name."""
    x, step, b, c = (unit_last_stride(part) for part in (x_BTC, step_BTC, b_BTN, c_BTN))
    initial = None if initial_state_BCN is None else initial_state_BCN.contiguous()
    y, final = SelectiveScan.apply(x, step, rate_CN.contiguous(), b, c, initial, document_ids_BT)
    return y, final
