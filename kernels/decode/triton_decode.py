"""Steps of one token as Triton kernels: one launch each, bound by the bytes of the states.

Legend: B batch, H heads, F feature dim, R packed rows, V value head dim, N places of a waiting line, W window_left, P rotated pairs,
D channels, K taps, h = K - 1, C vocabulary rows.

Programs are independent and hold no more than a tile at a time, so that many share a multiprocessor and their loads overlap.
Each entry of a state is loaded and stored by the one program that owns it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from based_megatron.kernels.decode.states import ConvState, TaylorState, WindowState
from based_megatron.kernels.triton_overlap import overlapped, wait_for_inputs
from based_megatron.kernels.packing import packed_rows


@triton.jit
def _factors(row, F: tl.constexpr, R: tl.constexpr):
    """Indices of the two features whose product is row `row` of a decoding state; F stands for the constant 1.

    Rows: x_a, then x_a x_(a + shift mod F) for shift = 0, 1, .. as far as pairs are new, then the 1; see `rows_by_shift`.
    """
    constant = row == R - 1
    first = row % F
    second = (first + row // F - 1) % F
    return tl.where(constant, F, first), tl.where(constant | (row < F), F, second)


@triton.jit
def _packed_query(q_ptr, row, F: tl.constexpr, R: tl.constexpr):
    """Rows of packed(q), with the weights that turn packed(q).packed(k) into 1 + s + s^2/2; zeros from R on."""
    first, second = _factors(row, F, R)
    q_first = tl.load(q_ptr + first, mask=(first < F) & (row < R), other=1.0).to(tl.float32)
    q_second = tl.load(q_ptr + second, mask=(second < F) & (row < R), other=1.0).to(tl.float32)
    weight = tl.where(row < F, F**-0.5, tl.where(row < 2 * F, 0.5 / F, 1.0 / F))
    return tl.where(row < R, q_first * q_second * tl.where(row == R - 1, 1.0, weight), 0.0)


@triton.jit
def _attend_to_waiting(
    q_ptr, moments_ptr, normaliser_ptr, k_line_ptr, v_line_ptr, waiting, k_own, v_own, feature, column,
    F: tl.constexpr, R: tl.constexpr, V: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Numerators and normaliser of q over the moments, the keys that wait and the own one: tiles of ROWS rows, the last one of TAIL."""
    inside, real_feature = column < V, feature < F
    q = tl.load(q_ptr + feature, mask=real_feature, other=0.0).to(tl.float32) * F**-0.5
    n = tl.arange(0, N)
    waits = n < waiting
    keys_mask, values_mask = waits[:, None] & real_feature[None, :], waits[:, None] & inside[None, :]
    keys = tl.load(k_line_ptr + n[:, None] * F + feature[None, :], mask=keys_mask, other=0.0).to(tl.float32)
    values = tl.load(v_line_ptr + n[:, None] * V + column[None, :], mask=values_mask, other=0.0).to(tl.float32)
    scores = tl.sum(keys * q[None, :], axis=1)
    weights = tl.where(waits, 1.0 + scores + 0.5 * scores * scores, 0.0)
    score = tl.sum(q * k_own.to(tl.float32), axis=0)
    weight_own = 1.0 + score + 0.5 * score * score
    denominator = weight_own + tl.sum(weights, axis=0)
    numerator = weight_own * v_own.to(tl.float32) + tl.sum(weights[:, None] * values, axis=0)
    for start in tl.static_range(0, R, ROWS):
        row = start + tl.arange(0, ROWS if R - start > TAIL else TAIL)
        place, mask = row[:, None] * V + column[None, :], (row < R)[:, None] & inside[None, :]
        moments = tl.load(moments_ptr + place, mask=mask, other=0.0)
        z = tl.load(normaliser_ptr + row, mask=row < R, other=0.0)
        q_packed = _packed_query(q_ptr, row, F, R)
        denominator += tl.sum(q_packed * z, axis=0)
        numerator += tl.sum(q_packed[:, None] * moments, axis=0)
    return numerator, denominator


@triton.jit
def _absorb_and_attend(
    q_ptr, moments_ptr, normaliser_ptr, k_line_ptr, v_line_ptr, column,
    F: tl.constexpr, R: tl.constexpr, V: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds the full line to the moments, in tiles of ROWS rows; numerators and normaliser of q over the sums."""
    inside, n = column < V, tl.arange(0, N)
    values = tl.load(v_line_ptr + n[:, None] * V + column[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
    numerator = tl.zeros([column.shape[0]], tl.float32)
    denominator = 0.0
    for start in range(0, R, ROWS):
        row = start + tl.arange(0, ROWS)
        place, mask = row[:, None] * V + column[None, :], (row < R)[:, None] & inside[None, :]
        moments = tl.load(moments_ptr + place, mask=mask, other=0.0)
        z = tl.load(normaliser_ptr + row, mask=row < R, other=0.0)
        first, second = _factors(row, F, R)
        keys = k_line_ptr + n[None, :] * F
        k_first = tl.load(keys + first[:, None], mask=(first < F)[:, None], other=1.0).to(tl.float32)
        k_second = tl.load(keys + second[:, None], mask=(second < F)[:, None], other=1.0).to(tl.float32)
        k_packed = k_first * k_second
        # Three products of tf32 parts: products of bf16 numbers are exact.
        moments = tl.dot(k_packed, values, moments, input_precision="tf32x3")
        z += tl.sum(k_packed, axis=1)
        tl.store(moments_ptr + place, moments, mask=mask)
        tl.store(normaliser_ptr + row, z, mask=row < R)
        q_packed = _packed_query(q_ptr, row, F, R)
        denominator += tl.sum(q_packed * z, axis=0)
        numerator += tl.sum(q_packed[:, None] * moments, axis=0)
    return numerator, denominator


@triton.jit
def _taylor_step(
    q_ptr, k_ptr, v_ptr, moments_ptr, normaliser_ptr, k_line_ptr, v_line_ptr, waiting_ptr, o_ptr,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b, v_stride_h, H,
    F: tl.constexpr, R: tl.constexpr, V: tl.constexpr, N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr, ABSORBED_ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program is one head of one row."""
    wait_for_inputs(OVERLAPS)
    program = tl.program_id(0).to(tl.int64)
    b, h = program // H, program % H
    q_ptr += b * q_stride_b + h * q_stride_h
    moments_ptr += program * R * V
    normaliser_ptr += program * R
    k_line_ptr += program * N * F
    v_line_ptr += program * N * V
    waiting = tl.load(waiting_ptr + program)

    feature, column = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_V)
    k_own = tl.load(k_ptr + b * k_stride_b + h * k_stride_h + feature, mask=feature < F, other=0.0)
    v_own = tl.load(v_ptr + b * v_stride_b + h * v_stride_h + column, mask=column < V, other=0.0)
    tl.store(k_line_ptr + waiting * F + feature, k_own, mask=feature < F)
    tl.store(v_line_ptr + waiting * V + column, v_own, mask=column < V)
    # Threads read what others have written here, and all have read the count before one of them changes it.
    tl.debug_barrier()
    tl.store(waiting_ptr + program, (waiting + 1) % N)
    if waiting == N - 1:
        numerator, denominator = _absorb_and_attend(
            q_ptr, moments_ptr, normaliser_ptr, k_line_ptr, v_line_ptr, column, F, R, V, N, ABSORBED_ROWS
        )
    else:
        numerator, denominator = _attend_to_waiting(
            q_ptr, moments_ptr, normaliser_ptr, k_line_ptr, v_line_ptr, waiting, k_own, v_own, feature, column,
            F, R, V, N, ROWS, TAIL,
        )  # fmt: skip
    tl.store(o_ptr + program * V + column, (numerator / denominator).to(o_ptr.dtype.element_ty), mask=column < V)


def taylor_step(
    q_BHF: Tensor,
    k_BHF: Tensor,
    v_BHV: Tensor,
    state: TaylorState,
    *,
    rows: int = 32,
    absorbed_rows: int = 16,
    num_warps: int = 2,
) -> Tensor:
    """Append (k, v), then attend with q; see the package's function of the same name.

    rows, absorbed_rows, num_warps: tiles of the state; they change speed, not the result.
    """
    B, H, F = q_BHF.shape
    V, R = v_BHV.shape[-1], packed_rows(F)
    o_BHV = torch.empty(B, H, V, dtype=v_BHV.dtype, device=v_BHV.device)
    assert q_BHF.stride(-1) == k_BHF.stride(-1) == v_BHV.stride(-1) == 1, "features must be dense"
    _taylor_step[(B * H,)](
        q_BHF,
        k_BHF,
        v_BHV,
        state.moments_BHRV,
        state.normaliser_BHR,
        state.k_BHNF,
        state.v_BHNV,
        state.waiting_BH,
        o_BHV,
        *q_BHF.stride()[:2],
        *k_BHF.stride()[:2],
        *v_BHV.stride()[:2],
        H,
        F=F,
        R=R,
        V=V,
        N=state.k_BHNF.shape[2],
        BLOCK_F=triton.next_power_of_2(F),
        # Matrix products have at least 16 columns.
        BLOCK_V=max(16, triton.next_power_of_2(V)),
        ROWS=rows,
        TAIL=min(rows, triton.next_power_of_2(R - (R - 1) // rows * rows)),
        ABSORBED_ROWS=absorbed_rows,
        num_warps=num_warps,
        **overlapped(o_BHV.device),
    )
    return o_BHV


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, column, inside, P: tl.constexpr):
    """One head, rotated in its first 2 P dims and rounded to its dtype, as fp32."""
    x = tl.load(x_ptr + column, mask=inside, other=0.0)
    turned = inside & (column < 2 * P)
    pair = tl.where(column < P, column, column - P)
    partner = tl.load(x_ptr + tl.where(column < P, column + P, column - P), mask=turned, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + pair, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + pair, mask=turned, other=0.0).to(tl.float32)
    rotated = x.to(tl.float32) * cos + tl.where(column < P, -partner, partner) * sin
    return rotated.to(x.dtype).to(tl.float32)


@triton.jit
def _window_step(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    k_ring_ptr,
    v_ring_ptr,
    position_ptr,
    o_ptr,
    q_stride_b,
    q_stride_h,
    k_stride_b,
    k_stride_h,
    v_stride_b,
    v_stride_h,
    cos_stride_b,
    sin_stride_b,
    H,
    scale,
    P: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program is one head of one row: tiles of ROWS keys."""
    wait_for_inputs(OVERLAPS)
    program = tl.program_id(0).to(tl.int64)
    b, h = program // H, program % H
    position = tl.load(position_ptr + b)
    k_ring_ptr += program * (W + 1) * V
    v_ring_ptr += program * (W + 1) * V
    cos_ptr += b * cos_stride_b
    sin_ptr += b * sin_stride_b

    column = tl.arange(0, BLOCK_V)
    inside = column < V
    q = _rotated(q_ptr + b * q_stride_b + h * q_stride_h, cos_ptr, sin_ptr, column, inside, P)
    k = _rotated(k_ptr + b * k_stride_b + h * k_stride_h, cos_ptr, sin_ptr, column, inside, P)
    v = tl.load(v_ptr + b * v_stride_b + h * v_stride_h + column, mask=inside, other=0.0)
    q *= scale

    # The own slot is none of those read below, so that no barrier is needed.
    slot = (position % (W + 1)).to(tl.int32)
    tl.store(k_ring_ptr + slot * V + column, k.to(k_ring_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ring_ptr + slot * V + column, v, mask=inside)

    # Each of ROWS lanes keeps a softmax of its own until all keys are read: threads need not wait for each other meanwhile.
    own = tl.sum(q * k, axis=0)
    largest = tl.full([ROWS], 0.0, tl.float32) + own
    totals = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_V], tl.float32)
    written = tl.minimum(position, W)
    for start in tl.static_range(0, W, ROWS):
        index = start + tl.arange(0, ROWS)
        real = index < written
        # All slots but the own one. Until the ring is full that is the first one free.
        slots = index + (index >= slot)
        place = slots[:, None] * V + column[None, :]
        mask = real[:, None] & inside[None, :]
        keys = tl.load(k_ring_ptr + place, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(v_ring_ptr + place, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(real, tl.sum(keys * q[None, :], axis=1), float("-inf"))
        new_largest = tl.maximum(largest, scores)
        p = tl.exp(scores - new_largest)
        shrink = tl.exp(largest - new_largest)
        totals = totals * shrink + p
        sums = sums * shrink[:, None] + p[:, None] * values
        largest = new_largest
    top = tl.max(largest, axis=0)
    shares, share_own = tl.exp(largest - top), tl.exp(own - top)
    total = tl.sum(totals * shares, axis=0) + share_own
    o = tl.sum(sums * shares[:, None], axis=0) + share_own * v.to(tl.float32)
    tl.store(o_ptr + program * V + column, (o / total).to(o_ptr.dtype.element_ty), mask=inside)


def window_step(
    q_BHV: Tensor,
    k_BHV: Tensor,
    v_BHV: Tensor,
    cos_BP: Tensor,
    sin_BP: Tensor,
    state: WindowState,
    position_B: Tensor,
    *,
    rows: int = 4,
    num_warps: int = 1,
) -> Tensor:
    """Rotate, store the key and value, attend; see the package's function of the same name.

    rows, num_warps: keys of a tile; they change speed, not the result.
    """
    B, H, V = q_BHV.shape
    o_BHV = torch.empty(B, H, V, dtype=v_BHV.dtype, device=v_BHV.device)
    assert q_BHV.stride(-1) == k_BHV.stride(-1) == v_BHV.stride(-1) == 1, "heads must be dense"
    _window_step[(B * H,)](
        q_BHV,
        k_BHV,
        v_BHV,
        cos_BP,
        sin_BP,
        state.k_BHWV,
        state.v_BHWV,
        position_B,
        o_BHV,
        *q_BHV.stride()[:2],
        *k_BHV.stride()[:2],
        *v_BHV.stride()[:2],
        cos_BP.stride(0),
        sin_BP.stride(0),
        H,
        V**-0.5,
        P=cos_BP.shape[-1],
        V=V,
        W=state.window_left,
        BLOCK_V=triton.next_power_of_2(V),
        ROWS=rows,
        num_warps=num_warps,
        **overlapped(o_BHV.device),
    )
    return o_BHV


@triton.jit
def _conv_step(
    u_ptr,
    gate_ptr,
    weight_ptr,
    inputs_ptr,
    y_ptr,
    u_stride_b,
    gate_stride_b,
    B,
    D,
    K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_inputs(OVERLAPS)
    b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    inside = (b < B) & (column < D)
    u = tl.load(u_ptr + b * u_stride_b + column, mask=inside, other=0.0)
    gate = tl.load(gate_ptr + b * gate_stride_b + column, mask=inside, other=0.0).to(tl.float32)
    c = u.to(tl.float32) * tl.load(weight_ptr + column * K + K - 1, mask=column < D, other=0.0).to(tl.float32)
    state_ptr = inputs_ptr + b * (K - 1) * D + column
    past = ()
    for i in tl.static_range(K - 1):
        past = past + (tl.load(state_ptr + i * D, mask=inside, other=0.0),)  # noqa: RUF005
        c += past[i].to(tl.float32) * tl.load(weight_ptr + column * K + i, mask=column < D, other=0.0).to(tl.float32)
    # Every input moves to the place before its own: all are read first.
    tl.debug_barrier()
    for i in tl.static_range(1, K - 1):
        tl.store(state_ptr + (i - 1) * D, past[i], mask=inside)
    if K > 1:
        tl.store(state_ptr + (K - 2) * D, u, mask=inside)
    y = c * tl.sigmoid(c) * gate
    tl.store(y_ptr + b * D + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def conv_step(
    u_BD: Tensor,
    gate_BD: Tensor,
    weight_DK: Tensor,
    state: ConvState,
    *,
    block_b: int = 4,
    block_d: int = 256,
    num_warps: int = 4,
) -> Tensor:
    """Convolve, gate and shift; see the package's function of the same name.

    block_b, block_d, num_warps: tile of a program; they change speed, not the result.
    """
    B, D = u_BD.shape
    y_BD = torch.empty(B, D, dtype=u_BD.dtype, device=u_BD.device)
    assert u_BD.stride(-1) == gate_BD.stride(-1) == 1 and weight_DK.is_contiguous(), "channels must be dense"
    _conv_step[(triton.cdiv(B, block_b), triton.cdiv(D, block_d))](
        u_BD,
        gate_BD,
        weight_DK,
        state.inputs_BhD,
        y_BD,
        u_BD.stride(0),
        gate_BD.stride(0),
        B,
        D,
        K=weight_DK.shape[1],
        BLOCK_B=block_b,
        BLOCK_D=block_d,
        num_warps=num_warps,
        **overlapped(y_BD.device),
    )
    return y_BD


@triton.jit
def _choose_token(logits_ptr, token_ptr, stride_b, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    """One program is one row: each lane keeps the best of its columns, the first of equals."""
    wait_for_inputs(OVERLAPS)
    b = tl.program_id(0).to(tl.int64)
    logits_ptr += b * stride_b
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in tl.static_range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        # Without a mask, loads are of 16 bytes.
        if start + BLOCK <= COLUMNS:
            x = tl.load(logits_ptr + column).to(tl.float32)
        else:
            x = tl.load(logits_ptr + column, mask=column < COLUMNS, other=float("-inf")).to(tl.float32)
        place = tl.where(x > largest, column, place)
        largest = tl.maximum(largest, x)
    best = tl.min(tl.where(largest == tl.max(largest, axis=0), place, COLUMNS), axis=0)
    tl.store(token_ptr + b, best.to(tl.int64))


def choose_token(
    logits_BC: Tensor, vocab_size: int, token_B: Tensor, *, block: int = 8192, num_warps: int = 16
) -> None:
    """The most likely token; see the package's function of the same name. block, num_warps: change speed, not the result."""
    assert logits_BC.stride(-1) == 1
    _choose_token[(len(logits_BC),)](
        logits_BC,
        token_B,
        logits_BC.stride(0),
        COLUMNS=vocab_size,
        BLOCK=block,
        num_warps=num_warps,
        **overlapped(token_B.device),
    )
