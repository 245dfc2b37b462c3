# ruff: noqa: RUF005 (Triton has no starred tuples)
"""Triton kernels of the gated convolution; `triton_conv.py` launches them.

Legend: B batch, T tokens, D channels, K taps.

Lag j = 0 .. K - 1 is the distance back from an output to an input: c_t = sum_j w_j u_{t-j}, w_j = weight[:, K - 1 - j].
A halo has K - 1 inputs, and document ids begin with theirs. Based has a gate and no bias, Mamba a bias and no gate.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _document(ids_ptr, position, T, K: tl.constexpr, HAS_HALO: tl.constexpr):
    """Document of an input; -1 where there is none."""
    if HAS_HALO:
        return tl.load(ids_ptr + position + (K - 1), mask=position < T, other=-1)
    return tl.load(ids_ptr + position, mask=(position >= 0) & (position < T), other=-1)


@triton.jit
def _channels_if(condition, d, D):
    """Mask of the channels that exist, empty unless the scalar condition holds."""
    return d < tl.where(condition, D, 0)


@triton.jit
def forward_kernel(
    u, gate, weight_ptr, bias_ptr, halo, ids, y, T, D,
    K: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_HALO: tl.constexpr, HAS_IDS: tl.constexpr,
    TILE_TOKENS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: a tile [TILE_TOKENS, TILE_CHANNELS] of y. The K shifted tiles of u overlap, so all but the first come from cache."""
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2).to(tl.int64) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    d = tl.program_id(0) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    u_ptr, gate_ptr, y_ptr = u.ptr + b * u.stride_b, gate.ptr + b * gate.stride_b, y.ptr + b * y.stride_b
    halo_ptr, ids_ptr = halo.ptr + b * halo.stride_b, ids.ptr + b * ids.stride_b
    inside = (t < T)[:, None] & (d < D)[None, :]
    if HAS_GATE:
        gate_tile = tl.load(gate_ptr + t[:, None] * gate.stride_t + d[None, :], mask=inside, other=0).to(tl.float32)
    if HAS_IDS:
        document = _document(ids_ptr, t, T, K, HAS_HALO)
    c = tl.zeros((TILE_TOKENS, TILE_CHANNELS), tl.float32)
    for lag in tl.static_range(K):
        position = t - lag
        seen = position >= 0
        if HAS_IDS:
            other = _document(ids_ptr, position, T, K, HAS_HALO)
            same = (other == document) & (other >= 0)
            seen &= same
        term = tl.load(u_ptr + position[:, None] * u.stride_t + d[None, :], mask=inside & seen[:, None], other=0)
        if HAS_HALO and lag > 0:
            in_halo = position < 0
            if HAS_IDS:
                in_halo &= same
            row = position + (K - 1)
            term += tl.load(
                halo_ptr + row[:, None] * halo.stride_t + d[None, :], mask=inside & in_halo[:, None], other=0
            )
        w = tl.load(weight_ptr + d * K + (K - 1 - lag), mask=d < D, other=0).to(tl.float32)
        c += term.to(tl.float32) * w[None, :]
    if HAS_BIAS:
        c += tl.load(bias_ptr + d, mask=d < D, other=0).to(tl.float32)[None, :]
    out = c * tl.sigmoid(c)
    if HAS_GATE:
        out *= gate_tile
    tl.store(y_ptr + t[:, None] * y.stride_t + d[None, :], out.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    u, gate, weight_ptr, bias_ptr, halo, ids, dy, du, dgate, dhalo_ptr, partial_dweight_ptr, T, D,
    K: tl.constexpr, HAS_GATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_HALO: tl.constexpr, HAS_IDS: tl.constexpr,
    TILE_TOKENS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: TILE_TOKENS tokens of one sequence, in order, with the last K - 1 inputs and the unfinished du in registers.

    So c_t and its sigmoid are computed once per token, and each input is read once: but for the K - 1 tokens after the last,
    whose dc reaches back into this program's du.
    """
    b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(2).to(tl.int64) * TILE_TOKENS
    d = tl.program_id(0) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    inside = d < D
    u_ptr, gate_ptr, dy_ptr = u.ptr + b * u.stride_b + d, gate.ptr + b * gate.stride_b + d, dy.ptr + b * dy.stride_b + d
    halo_ptr, ids_ptr = halo.ptr + b * halo.stride_b + d, ids.ptr + b * ids.stride_b
    du_ptr, dgate_ptr = du.ptr + b * du.stride_b + d, dgate.ptr + b * dgate.stride_b + d
    dhalo_ptr += b * (K - 1) * D + d
    zero = tl.zeros((TILE_CHANNELS,), tl.float32)

    bias, dbias = zero, zero
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=inside, other=0).to(tl.float32)
    w, dw, pending, past, past_documents = (), (), (), (), ()
    for lag in tl.static_range(K):
        w = w + (tl.load(weight_ptr + d * K + (K - 1 - lag), mask=inside, other=0).to(tl.float32),)
        dw = dw + (zero,)
    for lag in tl.static_range(1, K):
        position = start - lag
        term = tl.load(u_ptr + position * u.stride_t, mask=_channels_if(position >= 0, d, D), other=0)
        if HAS_HALO:
            term += tl.load(
                halo_ptr + (position + K - 1) * halo.stride_t, mask=_channels_if(position < 0, d, D), other=0
            )
        past = past + (term.to(tl.float32),)
        pending = pending + (zero,)
        if HAS_IDS:
            past_documents = past_documents + (_document(ids_ptr, position, T, K, HAS_HALO),)

    end = start + TILE_TOKENS
    for first in range(0, tl.minimum(TILE_TOKENS, T - start) + K - 1, TILE_ROWS):
        # All loads of a few tokens are under way before the first is used.
        u_rows, gate_rows, dy_rows = (), (), ()
        for row in tl.static_range(TILE_ROWS):
            t = start + first + row
            loaded = _channels_if((t < T) & (t < end + K - 1), d, D)
            u_rows = u_rows + (tl.load(u_ptr + t * u.stride_t, mask=loaded, other=0),)
            if HAS_GATE:
                gate_rows = gate_rows + (tl.load(gate_ptr + t * gate.stride_t, mask=loaded, other=0),)
            dy_rows = dy_rows + (tl.load(dy_ptr + t * dy.stride_t, mask=loaded, other=0),)

        for row in tl.static_range(TILE_ROWS):
            t = start + first + row
            inputs = (u_rows[row].to(tl.float32),) + past
            if HAS_IDS:
                document = _document(ids_ptr, t, T, K, HAS_HALO)
                documents = (document,) + past_documents
                seen_inputs = ()
                for lag in tl.static_range(K):
                    seen = (documents[lag] == document) & (document >= 0)
                    seen_inputs = seen_inputs + (tl.where(seen, inputs[lag], 0.0),)
            else:
                seen_inputs = inputs
            c = bias
            for lag in tl.static_range(K):
                c += w[lag] * seen_inputs[lag]
            sigmoid = tl.sigmoid(c)
            dy_silu = dy_rows[row].to(tl.float32) * sigmoid
            dsilu = dy_silu
            if HAS_GATE:
                dsilu *= gate_rows[row].to(tl.float32)
            dc = dsilu * (1 + c * (1 - sigmoid))
            if HAS_GATE:
                own = _channels_if((t < T) & (t < end), d, D)
                tl.store(dgate_ptr + t * dgate.stride_t, (dy_silu * c).to(dgate_ptr.dtype.element_ty), mask=own)

            # du of this token starts here, and that of the token K - 1 before is complete.
            own_dc = tl.where(t < end, dc, 0.0)
            dbias += own_dc
            started, new_dw = (), ()
            for lag in tl.static_range(K):
                new_dw = new_dw + (dw[lag] + own_dc * seen_inputs[lag],)
                du_term = w[lag] * dc
                if HAS_IDS:
                    du_term = tl.where((documents[lag] == document) & (document >= 0), du_term, 0.0)
                if lag > 0:
                    du_term += pending[lag - 1]
                started = started + (du_term,)
            dw = new_dw
            position = t - (K - 1)
            done = started[K - 1]
            finished = _channels_if((position >= start) & (position < T) & (position < end), d, D)
            tl.store(du_ptr + position * du.stride_t, done.to(du_ptr.dtype.element_ty), mask=finished)
            if HAS_HALO:
                in_halo = _channels_if(position < 0, d, D)
                tl.store(dhalo_ptr + (position + K - 1) * D, done.to(dhalo_ptr.dtype.element_ty), mask=in_halo)
            pending = started[: K - 1]
            past = inputs[: K - 1]
            if HAS_IDS:
                past_documents = documents[: K - 1]

    program = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + b
    partial_dweight_ptr += program * (K + HAS_BIAS) * D + d
    for lag in tl.static_range(K):
        tl.store(partial_dweight_ptr + (K - 1 - lag) * D, dw[lag], mask=inside)
    if HAS_BIAS:
        tl.store(partial_dweight_ptr + K * D, dbias, mask=inside)
