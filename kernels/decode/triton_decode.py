"""Steps of one token as Triton kernels: one launch each, bound by the bytes of the states.

Legend: B batch, H heads, F feature dim, R packed rows, V value head dim, N keys of a waiting line, W window_left, P rotated pairs,
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
from based_megatron.kernels.packing import packed_rows


@triton.jit
def _packed_pair(row, F: tl.constexpr):
    """Indices (a, b) of the features whose product is packed row `row`; F stands for the constant 1.

    Rows: the 1, then x_a, then x_a x_b for a <= b, row-major. Pair (a, a) is the a F - a (a - 1) / 2-th.
    """
    pair = row - 1 - F
    root = tl.sqrt(tl.maximum((2 * F + 1) * (2 * F + 1) - 8 * pair, 1).to(tl.float32))
    # At the first pair of a row the root is a whole number: 0.02 keeps a rounded one from falling short, and is less than a pair.
    a = ((2 * F + 1) - root + 0.02).to(tl.int32) // 2
    b = pair - a * F + a * (a - 1) // 2 + a
    first = tl.where(pair >= 0, a, tl.where(row == 0, F, row - 1))
    return first, tl.where(pair >= 0, b, F)


@triton.jit
def _packed(x_ptr, first, second, F: tl.constexpr):
    x_first = tl.load(x_ptr + first, mask=first < F, other=1.0).to(tl.float32)
    return x_first * tl.load(x_ptr + second, mask=second < F, other=1.0).to(tl.float32)


@triton.jit
def _taylor_step(
    q_ptr,
    k_ptr,
    v_ptr,
    moments_ptr,
    normaliser_ptr,
    k_line_ptr,
    v_line_ptr,
    waiting_ptr,
    o_ptr,
    q_stride_b,
    q_stride_h,
    k_stride_b,
    k_stride_h,
    v_stride_b,
    v_stride_h,
    H,
    F: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    ABSORBED_ROWS: tl.constexpr,
):
    """One program is one head of one row: tiles of ROWS rows of the state, the last one of TAIL if that is enough."""
    program = tl.program_id(0).to(tl.int64)
    b, h = program // H, program % H
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + h * k_stride_h
    moments_ptr += program * R * V
    normaliser_ptr += program * R
    k_line_ptr += program * N * F
    v_line_ptr += program * N * V
    waiting = tl.load(waiting_ptr + program)
    absorbs = waiting == N

    column = tl.arange(0, BLOCK_V)
    inside = column < V
    v_own = tl.load(v_ptr + b * v_stride_b + h * v_stride_h + column, mask=inside, other=0.0)
    v = v_own.to(tl.float32)
    if absorbs:
        for start in range(0, R, ABSORBED_ROWS):
            row = start + tl.arange(0, ABSORBED_ROWS)
            real = row < R
            place = row[:, None] * V + column[None, :]
            mask = real[:, None] & inside[None, :]
            first, second = _packed_pair(row, F)
            k_packed = _packed(k_ptr, first, second, F)
            z = tl.load(normaliser_ptr + row, mask=real, other=0.0) + k_packed
            moments = tl.load(moments_ptr + place, mask=mask, other=0.0) + k_packed[:, None] * v[None, :]
            for n in range(N):
                k_packed = _packed(k_line_ptr + n * F, first, second, F)
                v_waiting = tl.load(v_line_ptr + n * V + column, mask=inside, other=0.0).to(tl.float32)
                z += k_packed
                moments += k_packed[:, None] * v_waiting[None, :]
            tl.store(normaliser_ptr + row, z, mask=real)
            tl.store(moments_ptr + place, moments, mask=mask)
        # Other threads may read what this one has written.
        tl.debug_barrier()

    numerator = tl.zeros([BLOCK_V], dtype=tl.float32)
    denominator = 0.0
    for start in tl.static_range(0, R, ROWS):
        row = start + tl.arange(0, ROWS if R - start > TAIL else TAIL)
        real = row < R
        place = row[:, None] * V + column[None, :]
        mask = real[:, None] & inside[None, :]
        moments = tl.load(moments_ptr + place, mask=mask, other=0.0)
        z = tl.load(normaliser_ptr + row, mask=real, other=0.0)
        first, second = _packed_pair(row, F)
        weight = tl.where(second == F, F**-0.5, tl.where(first == second, 0.5 / F, 1.0 / F))
        weight = tl.where(row == 0, 1.0, weight)
        q_packed = tl.where(real, _packed(q_ptr, first, second, F) * weight, 0.0)
        denominator += tl.sum(q_packed * z, axis=0)
        numerator += tl.sum(q_packed[:, None] * moments, axis=0)

    if not absorbs:
        feature, n = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_N)
        real_feature, waits = feature < F, n < waiting
        q = tl.load(q_ptr + feature, mask=real_feature, other=0.0).to(tl.float32) * F**-0.5
        k_own = tl.load(k_ptr + feature, mask=real_feature, other=0.0)
        score = tl.sum(q * k_own.to(tl.float32), axis=0)
        weight_own = 1.0 + score + 0.5 * score * score
        keys_mask = waits[:, None] & real_feature[None, :]
        keys = tl.load(k_line_ptr + n[:, None] * F + feature[None, :], mask=keys_mask, other=0.0).to(tl.float32)
        values_mask = waits[:, None] & inside[None, :]
        values = tl.load(v_line_ptr + n[:, None] * V + column[None, :], mask=values_mask, other=0.0).to(tl.float32)
        scores = tl.sum(keys * q[None, :], axis=1)
        weights = tl.where(waits, 1.0 + scores + 0.5 * scores * scores, 0.0)
        denominator += weight_own + tl.sum(weights, axis=0)
        numerator += weight_own * v + tl.sum(weights[:, None] * values, axis=0)
        # The own place is none of those read above.
        tl.store(k_line_ptr + waiting * F + feature, k_own, mask=real_feature)
        tl.store(v_line_ptr + waiting * V + column, v_own, mask=inside)
    # All threads have read the count before one of them changes it.
    tl.debug_barrier()
    tl.store(waiting_ptr + program, tl.where(absorbs, 0, waiting + 1))
    tl.store(o_ptr + program * V + column, (numerator / denominator).to(o_ptr.dtype.element_ty), mask=inside)


def taylor_step(
    q_BHF: Tensor,
    k_BHF: Tensor,
    v_BHV: Tensor,
    state: TaylorState,
    *,
    rows: int | None = None,
    num_warps: int = 4,
) -> Tensor:
    """Append (k, v), then attend with q; see the package's function of the same name.

    rows, num_warps: tile of the state; they change speed, not the result.
    """
    B, H, F = q_BHF.shape
    rows = rows or (128 if v_BHV.shape[-1] <= 64 else 64)
    V, R, N = v_BHV.shape[-1], packed_rows(F), state.k_BHNF.shape[2]
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
        N=N,
        BLOCK_F=triton.next_power_of_2(F),
        BLOCK_V=triton.next_power_of_2(V),
        BLOCK_N=triton.next_power_of_2(N),
        ROWS=rows,
        TAIL=min(rows, triton.next_power_of_2(R - (R - 1) // rows * rows)),
        ABSORBED_ROWS=16,
        num_warps=num_warps,
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
):
    """One program is one head of one row; a softmax over tiles of ROWS keys, started by the own key."""
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

    largest = tl.sum(q * k, axis=0)
    total = 1.0
    o = v.to(tl.float32)
    written = tl.minimum(position, W)
    for start in tl.static_range(0, W, ROWS):
        back = start + tl.arange(0, ROWS)
        real = back < written
        # Keys from the newest back: position - 1, position - 2, ...
        slots = slot - 1 - back
        slots = tl.where(slots < 0, slots + W + 1, slots)
        place = slots[:, None] * V + column[None, :]
        mask = real[:, None] & inside[None, :]
        keys = tl.load(k_ring_ptr + place, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(v_ring_ptr + place, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(real, tl.sum(keys * q[None, :], axis=1), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=0))
        p = tl.exp(scores - new_largest)
        shrink = tl.exp(largest - new_largest)
        total = total * shrink + tl.sum(p, axis=0)
        o = o * shrink + tl.sum(p[:, None] * values, axis=0)
        largest = new_largest
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
    rows: int = 32,
    num_warps: int = 2,
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
):
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
    )
    return y_BD


@triton.jit
def _choose_token(logits_ptr, token_ptr, stride_b, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """One program is one row: each lane keeps the best of its columns, the first of equals."""
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
        logits_BC, token_B, logits_BC.stride(0), COLUMNS=vocab_size, BLOCK=block, num_warps=num_warps
    )
