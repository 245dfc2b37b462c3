"""The step of Taylor attention by one token, as a Triton kernel bound by the bytes of the state.

Legend: B batch, H heads, F feature dim, R rows of a packed state, V value head dim, S keys of a buffer.

Programs are independent and hold no more than a tile at a time, so that many share a multiprocessor and their loads overlap.
Each entry of a state is loaded and stored by the one program that owns it.

Strides are arguments of their own here, where other kernels take an `Operand`: a step is some hundreds of launches of microseconds, and
a named tuple costs the host one more of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from based_megatron.kernels.decode.states import TaylorState
from based_megatron.kernels.packing import SQUARE_EPSILON, packed_rows
from based_megatron.kernels.triton_overlap import overlapped, wait_for_inputs

TILE_ROWS, ABSORBED_TILE_ROWS, WARPS = 32, 16, 2
"""Rows of a state that a program takes at a time, and that it absorbs keys into at a time."""


@triton.jit
def _weights(scores, SQUARE: tl.constexpr):
    """w from s."""
    if SQUARE:
        return scores * scores
    return 1.0 + scores + 0.5 * scores * scores


@triton.jit
def _factors(row, F: tl.constexpr, R: tl.constexpr, SQUARE: tl.constexpr):
    """Indices of the two features whose product is row `row` of a decoding state; F stands for the constant 1.

    Rows: x_a, then x_a x_(a + shift mod F) for shift = 0, 1, .. as far as pairs are new, then the 1; see `rows_by_shift`.
    """
    if SQUARE:
        return row % F, (row % F + row // F) % F
    constant = row == R - 1
    first = row % F
    second = (first + row // F - 1) % F
    return tl.where(constant, F, first), tl.where(constant | (row < F), F, second)


@triton.jit
def _packed_query(q_ptr, row, F: tl.constexpr, R: tl.constexpr, SQUARE: tl.constexpr):
    """Rows of packed(q), with the weights that turn packed(q).packed(k) into w; zeros from R on."""
    first, second = _factors(row, F, R, SQUARE)
    q_first = tl.load(q_ptr + first, mask=(first < F) & (row < R), other=1.0).to(tl.float32)
    q_second = tl.load(q_ptr + second, mask=(second < F) & (row < R), other=1.0).to(tl.float32)
    if SQUARE:
        return tl.where(row < R, q_first * q_second * tl.where(row < F, 1.0 / F, 2.0 / F), 0.0)
    weight = tl.where(row < F, F**-0.5, tl.where(row < 2 * F, 0.5 / F, 1.0 / F))
    return tl.where(row < R, q_first * q_second * tl.where(row == R - 1, 1.0, weight), 0.0)


@triton.jit
def _attend_to_buffered(
    q_ptr, moments_ptr, normaliser_ptr, k_buffer_ptr, v_buffer_ptr, buffered, k_own, v_own, f, v,
    F: tl.constexpr, R: tl.constexpr, SQUARE: tl.constexpr, V: tl.constexpr, S: tl.constexpr,
    TILE_ROWS: tl.constexpr, LAST_TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Numerators and normaliser of q over the moments, the buffered keys and the own one. The last tile has LAST_TILE_ROWS rows."""
    inside_V, inside_F = v < V, f < F
    q = tl.load(q_ptr + f, mask=inside_F, other=0.0).to(tl.float32) * F**-0.5
    s = tl.arange(0, S)
    is_buffered = s < buffered
    keys_mask, values_mask = is_buffered[:, None] & inside_F[None, :], is_buffered[:, None] & inside_V[None, :]
    keys = tl.load(k_buffer_ptr + s[:, None] * F + f[None, :], mask=keys_mask, other=0.0).to(tl.float32)
    values = tl.load(v_buffer_ptr + s[:, None] * V + v[None, :], mask=values_mask, other=0.0).to(tl.float32)
    scores = tl.sum(keys * q[None, :], axis=1)
    weights = tl.where(is_buffered, _weights(scores, SQUARE), 0.0)
    score = tl.sum(q * k_own.to(tl.float32), axis=0)
    weight_own = _weights(score, SQUARE)
    denominator = weight_own + tl.sum(weights, axis=0)
    numerator = weight_own * v_own.to(tl.float32) + tl.sum(weights[:, None] * values, axis=0)
    for start in tl.static_range(0, R, TILE_ROWS):
        row = start + tl.arange(0, TILE_ROWS if R - start > LAST_TILE_ROWS else LAST_TILE_ROWS)
        place, mask = row[:, None] * V + v[None, :], (row < R)[:, None] & inside_V[None, :]
        moments = tl.load(moments_ptr + place, mask=mask, other=0.0)
        z = tl.load(normaliser_ptr + row, mask=row < R, other=0.0)
        q_packed = _packed_query(q_ptr, row, F, R, SQUARE)
        denominator += tl.sum(q_packed * z, axis=0)
        numerator += tl.sum(q_packed[:, None] * moments, axis=0)
    return numerator, denominator


@triton.jit
def _absorb_and_attend(
    q_ptr, moments_ptr, normaliser_ptr, k_buffer_ptr, v_buffer_ptr, v,
    F: tl.constexpr, R: tl.constexpr, SQUARE: tl.constexpr, V: tl.constexpr, S: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Numerators and normaliser of q over the moments, to which the full buffer is added; tiles of TILE_ROWS rows."""
    inside_V, s = v < V, tl.arange(0, S)
    values = tl.load(v_buffer_ptr + s[:, None] * V + v[None, :], mask=inside_V[None, :], other=0.0).to(tl.float32)
    numerator = tl.zeros([v.shape[0]], tl.float32)
    denominator = 0.0
    for start in range(0, R, TILE_ROWS):
        row = start + tl.arange(0, TILE_ROWS)
        place, mask = row[:, None] * V + v[None, :], (row < R)[:, None] & inside_V[None, :]
        moments = tl.load(moments_ptr + place, mask=mask, other=0.0)
        z = tl.load(normaliser_ptr + row, mask=row < R, other=0.0)
        first, second = _factors(row, F, R, SQUARE)
        keys = k_buffer_ptr + s[None, :] * F
        k_first = tl.load(keys + first[:, None], mask=(first < F)[:, None], other=1.0).to(tl.float32)
        k_second = tl.load(keys + second[:, None], mask=(second < F)[:, None], other=1.0).to(tl.float32)
        k_packed = k_first * k_second
        # Three products of tf32 parts: products of bf16 numbers are exact.
        moments = tl.dot(k_packed, values, moments, input_precision="tf32x3")
        z += tl.sum(k_packed, axis=1)
        tl.store(moments_ptr + place, moments, mask=mask)
        tl.store(normaliser_ptr + row, z, mask=row < R)
        q_packed = _packed_query(q_ptr, row, F, R, SQUARE)
        denominator += tl.sum(q_packed * z, axis=0)
        numerator += tl.sum(q_packed[:, None] * moments, axis=0)
    return numerator, denominator


@triton.jit
def _taylor_step_kernel(
    q_ptr, k_ptr, v_ptr, moments_ptr, normaliser_ptr, k_buffer_ptr, v_buffer_ptr, buffered_ptr, o_ptr,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b, v_stride_h, H,
    F: tl.constexpr, R: tl.constexpr, SQUARE: tl.constexpr, EPSILON: tl.constexpr, V: tl.constexpr, S: tl.constexpr,
    PADDED_F: tl.constexpr, PADDED_V: tl.constexpr, TILE_ROWS: tl.constexpr, LAST_TILE_ROWS: tl.constexpr, ABSORBED_TILE_ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program: one head of one sequence."""
    wait_for_inputs(OVERLAPS)
    program = tl.program_id(0).to(tl.int64)
    b, h = program // H, program % H
    q_ptr += b * q_stride_b + h * q_stride_h
    moments_ptr += program * R * V
    normaliser_ptr += program * R
    k_buffer_ptr += program * S * F
    v_buffer_ptr += program * S * V
    buffered = tl.load(buffered_ptr + program)

    f, v = tl.arange(0, PADDED_F), tl.arange(0, PADDED_V)
    k_own = tl.load(k_ptr + b * k_stride_b + h * k_stride_h + f, mask=f < F, other=0.0)
    v_own = tl.load(v_ptr + b * v_stride_b + h * v_stride_h + v, mask=v < V, other=0.0)
    tl.store(k_buffer_ptr + buffered * F + f, k_own, mask=f < F)
    tl.store(v_buffer_ptr + buffered * V + v, v_own, mask=v < V)
    # Threads read what others have written here, and all have read the count before one of them changes it.
    tl.debug_barrier()
    tl.store(buffered_ptr + program, (buffered + 1) % S)
    if buffered == S - 1:
        numerator, denominator = _absorb_and_attend(
            q_ptr, moments_ptr, normaliser_ptr, k_buffer_ptr, v_buffer_ptr, v, F, R, SQUARE, V, S, ABSORBED_TILE_ROWS
        )
    else:
        numerator, denominator = _attend_to_buffered(
            q_ptr, moments_ptr, normaliser_ptr, k_buffer_ptr, v_buffer_ptr, buffered, k_own, v_own, f, v,
            F, R, SQUARE, V, S, TILE_ROWS, LAST_TILE_ROWS,
        )  # fmt: skip
    if SQUARE:
        denominator += EPSILON
    tl.store(o_ptr + program * V + v, (numerator / denominator).to(o_ptr.dtype.element_ty), mask=v < V)


def taylor_step(q_BHF: Tensor, k_BHF: Tensor, v_BHV: Tensor, state: TaylorState) -> Tensor:
    """o of the next token, whose (k, v) the state takes in; see the package's function of this name."""
    B, H, F = q_BHF.shape
    V, square = v_BHV.shape[-1], state.square
    R = packed_rows(F, square)
    o_BHV = torch.empty(B, H, V, dtype=v_BHV.dtype, device=v_BHV.device)
    assert q_BHF.stride(-1) == k_BHF.stride(-1) == v_BHV.stride(-1) == 1, "features must be dense"
    _taylor_step_kernel[(B * H,)](
        q_BHF,
        k_BHF,
        v_BHV,
        state.moments_BHRV,
        state.normaliser_BHR,
        state.k_BHSF,
        state.v_BHSV,
        state.buffered_BH,
        o_BHV,
        *q_BHF.stride()[:2],
        *k_BHF.stride()[:2],
        *v_BHV.stride()[:2],
        H,
        F=F,
        R=R,
        SQUARE=square,
        EPSILON=SQUARE_EPSILON,
        V=V,
        S=state.k_BHSF.shape[2],
        PADDED_F=triton.next_power_of_2(F),
        # Matrix products have at least 16 columns.
        PADDED_V=max(16, triton.next_power_of_2(V)),
        TILE_ROWS=TILE_ROWS,
        LAST_TILE_ROWS=min(TILE_ROWS, triton.next_power_of_2(R - (R - 1) // TILE_ROWS * TILE_ROWS)),
        ABSORBED_TILE_ROWS=ABSORBED_TILE_ROWS,
        num_warps=WARPS,
        **overlapped(o_BHV.device),
    )
    return o_BHV
