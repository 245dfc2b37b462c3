"""Steps of one token as Triton kernels: one launch each, bound by the bytes of the states.

Legend: B batch, H heads, V value head dim, W window_left, R rotated pairs, D channels, K taps, h = K - 1, U columns of the vocabulary.

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

from based_megatron.kernels.decode.states import ConvState, WindowState
from based_megatron.kernels.triton_overlap import overlapped, wait_for_inputs

WINDOW_TILE_KEYS = 4
"""Keys that a program of `window_step` reads at a time."""
TILE_SEQUENCES, TILE_CHANNELS = 4, 256
"""The sequences and channels that one program of `conv_step` computes."""
TILE_COLUMNS = 8192
"""Logits that `choose_token` reads at a time."""


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, column, inside, R: tl.constexpr):
    """One head as fp32, rotated in its first 2 R dims and rounded to its dtype."""
    x = tl.load(x_ptr + column, mask=inside, other=0.0)
    is_rotated = inside & (column < 2 * R)
    pair = tl.where(column < R, column, column - R)
    partner = tl.load(x_ptr + tl.where(column < R, column + R, column - R), mask=is_rotated, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + pair, mask=is_rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + pair, mask=is_rotated, other=0.0).to(tl.float32)
    rotated = x.to(tl.float32) * cos + tl.where(column < R, -partner, partner) * sin
    return rotated.to(x.dtype).to(tl.float32)


@triton.jit
def _window_step_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_ring_ptr, v_ring_ptr, position_ptr, o_ptr,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b, v_stride_h, cos_stride_b, sin_stride_b, H, scale,
    R: tl.constexpr, V: tl.constexpr, W: tl.constexpr, PADDED_V: tl.constexpr, TILE_KEYS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program: one head of one sequence, in tiles of TILE_KEYS keys."""
    wait_for_inputs(OVERLAPS)
    program = tl.program_id(0).to(tl.int64)
    b, h = program // H, program % H
    position = tl.load(position_ptr + b)
    k_ring_ptr += program * (W + 1) * V
    v_ring_ptr += program * (W + 1) * V
    cos_ptr += b * cos_stride_b
    sin_ptr += b * sin_stride_b

    column = tl.arange(0, PADDED_V)
    inside = column < V
    q = _rotated(q_ptr + b * q_stride_b + h * q_stride_h, cos_ptr, sin_ptr, column, inside, R)
    k = _rotated(k_ptr + b * k_stride_b + h * k_stride_h, cos_ptr, sin_ptr, column, inside, R)
    v = tl.load(v_ptr + b * v_stride_b + h * v_stride_h + column, mask=inside, other=0.0)
    q *= scale

    # The own slot is none of those read below, so that no barrier is needed.
    slot = (position % (W + 1)).to(tl.int32)
    tl.store(k_ring_ptr + slot * V + column, k.to(k_ring_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ring_ptr + slot * V + column, v, mask=inside)

    # Each of TILE_KEYS lanes keeps a softmax of its own until all keys are read: threads need not wait for each other meanwhile.
    own = tl.sum(q * k, axis=0)
    largest = tl.full([TILE_KEYS], 0.0, tl.float32) + own
    totals = tl.zeros([TILE_KEYS], tl.float32)
    sums = tl.zeros([TILE_KEYS, PADDED_V], tl.float32)
    count = tl.minimum(position, W)
    for start in tl.static_range(0, W, TILE_KEYS):
        index = start + tl.arange(0, TILE_KEYS)
        written = index < count
        # All slots but the own one. Until the ring is full that is the first one free.
        slots = index + (index >= slot)
        place = slots[:, None] * V + column[None, :]
        mask = written[:, None] & inside[None, :]
        keys = tl.load(k_ring_ptr + place, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(v_ring_ptr + place, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(written, tl.sum(keys * q[None, :], axis=1), float("-inf"))
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
    cos_BR: Tensor,
    sin_BR: Tensor,
    state: WindowState,
    position_B: Tensor,
) -> Tensor:
    """o of the next token, whose key and value the state takes in; see the package's function of this name."""
    B, H, V = q_BHV.shape
    o_BHV = torch.empty(B, H, V, dtype=v_BHV.dtype, device=v_BHV.device)
    assert q_BHV.stride(-1) == k_BHV.stride(-1) == v_BHV.stride(-1) == 1, "heads must be dense"
    _window_step_kernel[(B * H,)](
        q_BHV,
        k_BHV,
        v_BHV,
        cos_BR,
        sin_BR,
        state.k_BHWV,
        state.v_BHWV,
        position_B,
        o_BHV,
        *q_BHV.stride()[:2],
        *k_BHV.stride()[:2],
        *v_BHV.stride()[:2],
        cos_BR.stride(0),
        sin_BR.stride(0),
        H,
        V**-0.5,
        R=cos_BR.shape[-1],
        V=V,
        W=state.window_left,
        PADDED_V=triton.next_power_of_2(V),
        TILE_KEYS=WINDOW_TILE_KEYS,
        num_warps=1,
        **overlapped(o_BHV.device),
    )
    return o_BHV


@triton.jit
def _conv_step_kernel(
    u_ptr, gate_ptr, weight_ptr, inputs_ptr, y_ptr, u_stride_b, gate_stride_b, B, D,
    K: tl.constexpr, TILE_SEQUENCES: tl.constexpr, TILE_CHANNELS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of channels of some sequences."""
    wait_for_inputs(OVERLAPS)
    b = (tl.program_id(0) * TILE_SEQUENCES + tl.arange(0, TILE_SEQUENCES)).to(tl.int64)[:, None]
    d = (tl.program_id(1) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS))[None, :]
    inside = (b < B) & (d < D)
    u = tl.load(u_ptr + b * u_stride_b + d, mask=inside, other=0.0)
    gate = tl.load(gate_ptr + b * gate_stride_b + d, mask=inside, other=0.0).to(tl.float32)
    c = u.to(tl.float32) * tl.load(weight_ptr + d * K + K - 1, mask=d < D, other=0.0).to(tl.float32)
    state_ptr = inputs_ptr + b * (K - 1) * D + d
    past = ()
    for i in tl.static_range(K - 1):
        past = past + (tl.load(state_ptr + i * D, mask=inside, other=0.0),)  # noqa: RUF005
        c += past[i].to(tl.float32) * tl.load(weight_ptr + d * K + i, mask=d < D, other=0.0).to(tl.float32)
    # Every input moves to the place before its own: all are read first.
    tl.debug_barrier()
    for i in tl.static_range(1, K - 1):
        tl.store(state_ptr + (i - 1) * D, past[i], mask=inside)
    if K > 1:
        tl.store(state_ptr + (K - 2) * D, u, mask=inside)
    y = c * tl.sigmoid(c) * gate
    tl.store(y_ptr + b * D + d, y.to(y_ptr.dtype.element_ty), mask=inside)


def conv_step(u_BD: Tensor, gate_BD: Tensor, weight_DK: Tensor, state: ConvState) -> Tensor:
    """y of the next token, whose input the state takes in; see the package's function of this name."""
    B, D = u_BD.shape
    y_BD = torch.empty(B, D, dtype=u_BD.dtype, device=u_BD.device)
    assert u_BD.stride(-1) == gate_BD.stride(-1) == 1 and weight_DK.is_contiguous(), "channels must be dense"
    _conv_step_kernel[(triton.cdiv(B, TILE_SEQUENCES), triton.cdiv(D, TILE_CHANNELS))](
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
        TILE_SEQUENCES=TILE_SEQUENCES,
        TILE_CHANNELS=TILE_CHANNELS,
        num_warps=4,
        **overlapped(y_BD.device),
    )
    return y_BD


@triton.jit
def _choose_token_kernel(
    logits_ptr, token_ptr, logits_stride_b, COLUMNS: tl.constexpr, TILE_COLUMNS: tl.constexpr, OVERLAPS: tl.constexpr
):
    """One program: one sequence. Each lane keeps the best of its columns, the first of equals."""
    wait_for_inputs(OVERLAPS)
    b = tl.program_id(0).to(tl.int64)
    logits_ptr += b * logits_stride_b
    largest = tl.full([TILE_COLUMNS], float("-inf"), tl.float32)
    place = tl.zeros([TILE_COLUMNS], tl.int32)
    for start in tl.static_range(0, COLUMNS, TILE_COLUMNS):
        column = start + tl.arange(0, TILE_COLUMNS)
        # Without a mask, loads are of 16 bytes.
        if start + TILE_COLUMNS <= COLUMNS:
            x = tl.load(logits_ptr + column).to(tl.float32)
        else:
            x = tl.load(logits_ptr + column, mask=column < COLUMNS, other=float("-inf")).to(tl.float32)
        place = tl.where(x > largest, column, place)
        largest = tl.maximum(largest, x)
    best = tl.min(tl.where(largest == tl.max(largest, axis=0), place, COLUMNS), axis=0)
    tl.store(token_ptr + b, best.to(tl.int64))


def choose_token(logits_BU: Tensor, vocab_size: int, token_B: Tensor) -> None:
    """The most likely token; see the package's function of this name."""
    assert logits_BU.stride(-1) == 1
    _choose_token_kernel[(len(logits_BU),)](
        logits_BU,
        token_B,
        logits_BU.stride(0),
        COLUMNS=vocab_size,
        TILE_COLUMNS=TILE_COLUMNS,
        num_warps=16,
        **overlapped(token_B.device),
    )
