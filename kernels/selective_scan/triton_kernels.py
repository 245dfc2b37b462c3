# ruff: noqa: RUF005 (Triton has no starred tuples)
# mypy: disable-error-code="assignment,var-annotated"
"""Triton kernels of the selective scan; `triton_scan.py` launches them.

Legend: B batch, T tokens, C channels, N states of a channel, S saved states of a row, one before each chunk.

A thread has the N states of one channel in registers and walks over the tokens. It loads a group of tokens at a time, so that loads
overlap. b and c, which all channels share, come in fp32, for every thread reads all of them.

Backward goes over the groups of a chunk twice: forward, to note the state before each, and from the last to the first. There it
computes the states of a group again and, with g_t = y_t + skip x_t, a_t = exp(step_t rate), or 0 where a document begins, and dh from
the tokens after t:

    dg_t = dy_t silu(z_t),   dz_t = dy_t g_t silu'(z_t)
    dh <- dh + c_t dg_t,   dc_t = sum over channels of h_t dg_t,   db_t = sum over channels of step_t x_t dh
    dx_t = step_t (dh b_t) + skip dg_t,   drate = sum_t step_t a_t h_{t-1} dh
    draw_t = (x_t (dh b_t) + sum_n rate a_t h_{t-1} dh) sigmoid(raw_t + bias),   dh <- a_t dh
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(v):
    """log(1 + e^v) to the last bits, where it is small too: with e = e^-|v| and s = e / (2 + e), log(1 + e) = 2 atanh(s), s at most 1/3."""
    e = tl.exp2(tl.abs(v) * -LOG2_E)
    s = e / (2 + e)
    q = s * s
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(v, 0.0) + 2 * s * series


@triton.jit
def load_row(x, b, t, T, channels, C):
    """One token of an operand [B, T, C]; zeros beyond the last token."""
    inside = channels < tl.where(t < T, C, 0)
    return tl.load(x.ptr + b * x.stride_b + t * x.stride_t + channels, mask=inside, other=0)


@triton.jit
def store_row(x, b, t, T, channels, C, value):
    """One token of an operand [B, T, C], if it exists."""
    inside = channels < tl.where(t < T, C, 0)
    x_ptr = x.ptr + b * x.stride_b + t * x.stride_t + channels
    tl.store(x_ptr, value.to(x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_states(x, b, t, n, N: tl.constexpr):
    """One token of b or c, which have whole groups of tokens."""
    return tl.load(x.ptr + b * x.stride_b + t * N + n, mask=n < N, other=0)


@triton.jit
def step_of(raw, bias, t, T):
    """Steps of a token; beyond the last they are 0, which keeps the state."""
    return tl.where(t < T, softplus(raw.to(tl.float32) + bias), 0.0)


@triton.jit
def decay_of(step, rate2, ids, b, t, T, HAS_IDS: tl.constexpr):
    """What is left of the states at a token, [N, C], where rates are those of powers of 2; nothing where a document begins.

    The first token of a row goes on with the initial state.
    """
    decay = tl.exp2(step * rate2)
    if HAS_IDS:
        row_ptr = ids.ptr + b * ids.stride_b
        last = tl.minimum(t, T - 1)
        is_same = tl.load(row_ptr + last) == tl.load(row_ptr + tl.maximum(last - 1, 0))
        decay = tl.where(is_same | (t >= T), decay, 0.0)
    return decay


@triton.jit
def folded(x, lanes, BIT: tl.constexpr):
    """Half the rows of a tile whose columns are the threads of a warp, each added to that of thread lane ^ BIT.

    Threads without the bit take the lower half, those with it the upper.
    """
    halves = tl.reshape(x, (2, x.shape[0] // 2, x.shape[1]))
    low, high = tl.split(tl.permute(halves, (1, 2, 0)))
    is_upper = (lanes & BIT) != 0
    others = tl.broadcast_to(lanes ^ BIT, low.shape)
    return tl.where(is_upper, high, low) + tl.gather(tl.where(is_upper, low, high), others, axis=1)


@triton.jit
def sums_of_rows(x, lanes):
    """Sums over the 32 columns of a tile [rows, 32]: [rows / 32, 32], whose column j has those of rows j rows / 32 and on.

    This takes 31 exchanges between threads for 32 rows, where sums that all threads have take 160.
    """
    return folded(folded(folded(folded(folded(x, lanes, 16), lanes, 8), lanes, 4), lanes, 2), lanes, 1)


@triton.jit
def forward_kernel(
    x, raw, rate_ptr, b, c, gate, bias_ptr, skip_ptr, initial_ptr, ids, y, saved_ptr, final_ptr, T, C, S,
    N: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_IDS: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr, GROUP_TOKENS: tl.constexpr, TILE_CHANNELS: tl.constexpr, PADDED_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_CHANNELS channels of one row, all tokens in order."""
    row = tl.program_id(1).to(tl.int64)
    program = row * tl.num_programs(0) + tl.program_id(0)
    own = tl.arange(0, TILE_CHANNELS)[None, :]
    channels = tl.program_id(0) * TILE_CHANNELS + own
    n = tl.arange(0, PADDED_N)[:, None]
    inside = (channels < C) & (n < N)
    rate2 = tl.load(rate_ptr + channels * N + n, mask=inside, other=0) * LOG2_E
    bias = tl.load(bias_ptr + channels, mask=channels < C, other=0).to(tl.float32)
    skip = tl.load(skip_ptr + channels, mask=channels < C, other=0).to(tl.float32)
    ROW: tl.constexpr = TILE_CHANNELS + 1
    saved_ptr += (program * S * PADDED_N + n) * ROW + own
    h = tl.zeros((PADDED_N, TILE_CHANNELS), tl.float32)
    if HAS_INITIAL:
        h = tl.load(initial_ptr + (row * C + channels) * N + n, mask=inside, other=0)
    for s in range(S):
        tl.store(saved_ptr + s * PADDED_N * ROW, h)
        start = tl.cast(s, tl.int64) * CHUNK_TOKENS
        for group in range(tl.cdiv(tl.minimum(CHUNK_TOKENS, T - start), GROUP_TOKENS)):
            first = start + group * GROUP_TOKENS
            xs, raws, gates = (), (), ()
            for i in tl.static_range(GROUP_TOKENS):
                xs = xs + (load_row(x, row, first + i, T, channels, C),)
                raws = raws + (load_row(raw, row, first + i, T, channels, C),)
                gates = gates + (load_row(gate, row, first + i, T, channels, C),)
            for i in tl.static_range(GROUP_TOKENS):
                t = first + i
                x_t, z_t = xs[i].to(tl.float32), gates[i].to(tl.float32)
                step = step_of(raws[i], bias, t, T)
                decay = decay_of(step, rate2, ids, row, t, T, HAS_IDS)
                h = decay * h + (step * x_t) * load_states(b, row, t, n, N)
                read = tl.sum(h * load_states(c, row, t, n, N), axis=0)[None, :]
                store_row(y, row, t, T, channels, C, (read + skip * x_t) * z_t * tl.sigmoid(z_t))
    tl.store(final_ptr + (row * C + channels) * N + n, h, mask=inside)


@triton.jit
def backward_kernel(
    x, raw, rate_ptr, b, c, gate, bias_ptr, skip_ptr, ids, dy, dfinal_ptr, saved_ptr, noted_ptr,
    dx, draw, drate_ptr, dbc_ptr, dgate, dbias_ptr, dskip_ptr, dinitial_ptr, T, C, S,
    N: tl.constexpr, HAS_IDS: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr, GROUP_TOKENS: tl.constexpr, TILE_CHANNELS: tl.constexpr, PADDED_N: tl.constexpr,
):  # fmt: skip
    """One program: TILE_CHANNELS channels of one row, chunks from the last to the first; its sums over channels are partial."""
    row = tl.program_id(1).to(tl.int64)
    program = row * tl.num_programs(0) + tl.program_id(0)
    own = tl.arange(0, TILE_CHANNELS)[None, :]
    channels = tl.program_id(0) * TILE_CHANNELS + own
    n = tl.arange(0, PADDED_N)[:, None]
    inside = (channels < C) & (n < N)
    place = (row * C + channels) * N + n
    rate2 = tl.load(rate_ptr + channels * N + n, mask=inside, other=0) * LOG2_E
    bias = tl.load(bias_ptr + channels, mask=channels < C, other=0).to(tl.float32)
    skip = tl.load(skip_ptr + channels, mask=channels < C, other=0).to(tl.float32)
    dh = tl.load(dfinal_ptr + place, mask=inside, other=0)
    drate = tl.zeros((PADDED_N, TILE_CHANNELS), tl.float32)
    dbias, dskip = tl.zeros((1, TILE_CHANNELS), tl.float32), tl.zeros((1, TILE_CHANNELS), tl.float32)
    REST: tl.constexpr = PADDED_N // 16
    rows = own * REST + tl.arange(0, REST)[:, None]
    ROW: tl.constexpr = TILE_CHANNELS + 1
    saved_ptr += (program * S * PADDED_N + n) * ROW + own
    noted_ptr += (program * (CHUNK_TOKENS // GROUP_TOKENS) * PADDED_N + n) * ROW + own
    for back in range(S):
        s = S - 1 - back
        start = tl.cast(s, tl.int64) * CHUNK_TOKENS
        groups = tl.cdiv(tl.minimum(CHUNK_TOKENS, T - start), GROUP_TOKENS)
        h = tl.load(saved_ptr + s * PADDED_N * ROW)
        for group in range(groups):
            tl.store(noted_ptr + group * PADDED_N * ROW, h)
            xs, raws = (), ()
            for i in tl.static_range(GROUP_TOKENS):
                t = start + group * GROUP_TOKENS + i
                xs = xs + (load_row(x, row, t, T, channels, C),)
                raws = raws + (load_row(raw, row, t, T, channels, C),)
            for i in tl.static_range(GROUP_TOKENS):
                t = start + group * GROUP_TOKENS + i
                step = step_of(raws[i], bias, t, T)
                decay = decay_of(step, rate2, ids, row, t, T, HAS_IDS)
                h = decay * h + (step * xs[i].to(tl.float32)) * load_states(b, row, t, n, N)
        # A thread reads again what it wrote itself.
        tl.debug_barrier()
        for group_back in range(groups):
            group = groups - 1 - group_back
            first = start + group * GROUP_TOKENS
            xs, raws, gates, dys = (), (), (), ()
            for i in tl.static_range(GROUP_TOKENS):
                xs = xs + (load_row(x, row, first + i, T, channels, C),)
                raws = raws + (load_row(raw, row, first + i, T, channels, C),)
                gates = gates + (load_row(gate, row, first + i, T, channels, C),)
                dys = dys + (load_row(dy, row, first + i, T, channels, C),)
            states, decays = (tl.load(noted_ptr + group * PADDED_N * ROW),), ()
            for i in tl.static_range(GROUP_TOKENS):
                t = first + i
                step = step_of(raws[i], bias, t, T)
                decays = decays + (decay_of(step, rate2, ids, row, t, T, HAS_IDS),)
                added = (step * xs[i].to(tl.float32)) * load_states(b, row, t, n, N)
                states = states + (decays[i] * states[i] + added,)
            for i in tl.static_range(GROUP_TOKENS - 1, -1, -1):
                t = first + i
                x_t, z_t, dy_t = xs[i].to(tl.float32), gates[i].to(tl.float32), dys[i].to(tl.float32)
                step = step_of(raws[i], bias, t, T)
                b_t, c_t = load_states(b, row, t, n, N), load_states(c, row, t, n, N)
                sigmoid = tl.sigmoid(z_t)
                read = tl.sum(states[i + 1] * c_t, axis=0)[None, :] + skip * x_t
                store_row(dgate, row, t, T, channels, C, dy_t * read * sigmoid * (1 + z_t * (1 - sigmoid)))
                dread = dy_t * z_t * sigmoid
                dskip += dread * x_t

                dh += c_t * dread
                products = tl.permute(tl.join(dh * (step * x_t), states[i + 1] * dread), (2, 0, 1))
                sums = sums_of_rows(tl.reshape(products, (2 * PADDED_N, TILE_CHANNELS)), own)
                sums_ptr = dbc_ptr + (program * T + t) * 2 * PADDED_N + rows
                tl.store(sums_ptr, sums, mask=rows < tl.where(t < T, 2 * PADDED_N, 0))
                dh_b = tl.sum(dh * b_t, axis=0)[None, :]
                store_row(dx, row, t, T, channels, C, step * dh_b + skip * dread)
                dh = decays[i] * dh
                dexponent = dh * states[i]
                drate += dexponent * step
                dstep = x_t * dh_b + tl.sum(dexponent * rate2, axis=0)[None, :] / LOG2_E
                draw_t = tl.where(t < T, dstep * tl.sigmoid(raws[i].to(tl.float32) + bias), 0.0)
                dbias += draw_t
                store_row(draw, row, t, T, channels, C, draw_t)
        tl.debug_barrier()
    tl.store(drate_ptr + place, drate, mask=inside)
    tl.store(dinitial_ptr + place, dh, mask=inside)
    tl.store(dbias_ptr + row * C + channels, dbias, mask=channels < C)
    tl.store(dskip_ptr + row * C + channels, dskip, mask=channels < C)
