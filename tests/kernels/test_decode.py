"""Decoding steps equal the full-sequence ops, token by token, from the start and from the states of a prefix.

Legend: B batch, T tokens, H heads, F feature dim, V value head dim, W window_left, D channels, K taps.
"""

import pytest
import torch
from kernel_oracles import attention_oracle, conv_oracle, moments, taylor_oracle
from torch import Tensor

from based_megatron.kernels.decode import (
    BUFFERED_KEYS,
    ConvState,
    TaylorState,
    WindowState,
    choose_token,
    conv_step,
    taylor_step,
    window_step,
)
from based_megatron.kernels.rotary import apply_rotary, rotary_tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
B, T, H = 2, 9, 2
BF16 = 3e-3
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def views(*widths: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Parts [B, T, H, width] of one fused buffer, as a projection makes them: not contiguous."""
    fused = scale * torch.randn(B, T, H * sum(widths), device=DEVICE)
    parts = fused.split([H * width for width in widths], dim=-1)
    return tuple(part.unflatten(-1, (H, -1)) for part in parts)


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    got, want = got.double().cpu(), want.double().cpu()
    error = (got - want).norm() / want.norm().clamp_min(1e-30)
    assert got.shape == want.shape and error <= tolerance, f"relative error {error:.2e}"


def in_double(*tensors: Tensor) -> list[Tensor]:
    return [x.double().cpu() for x in tensors]


# taylor


def steps(q: Tensor, k: Tensor, v: Tensor, state: TaylorState, backend: str) -> Tensor:
    return torch.stack(
        [taylor_step(q[:, t], k[:, t], v[:, t], state, backend=backend) for t in range(q.shape[1])], dim=1
    )


@BACKENDS
@pytest.mark.parametrize(("F", "V"), [(16, 64), (8, 24), (4, 16), (1, 8)])
def test_taylor_steps_are_the_attention(backend, F, V):
    q, k, v = views(F, F, V)
    state = TaylorState.zeros(B, H, F, V, dtype=torch.float32, device=DEVICE)
    o = steps(q, k, v, state, backend)
    expected_o, expected_state = taylor_oracle(*in_double(q, k, v))
    assert_close(o, expected_o)
    assert_close(state.joined(), expected_state)


@BACKENDS
def test_taylor_steps_continue_a_state(backend):
    q, k, v = views(8, 8, 24)
    *_, prefix = taylor_oracle(*in_double(*(x[:, : T - 1] for x in (q, k, v))))
    state = TaylorState.zeros(B, H, 8, 24, dtype=torch.float32, device=DEVICE)
    state.set_joined(prefix.to(DEVICE))
    o = taylor_step(q[:, -1], k[:, -1], v[:, -1], state, backend=backend)
    assert_close(o, taylor_oracle(*in_double(q, k, v))[0][:, -1])


@BACKENDS
@pytest.mark.parametrize("T", [BUFFERED_KEYS, BUFFERED_KEYS + 1, 2 * BUFFERED_KEYS + 4])
def test_buffered_keys_count_like_absorbed_ones(backend, T):
    """Up to a full buffer, the step that absorbs it, and again. Places that were never written hold NaN."""
    q, k, v = (torch.randn(B, T, H, width, device=DEVICE) for width in (4, 4, 24))
    state = TaylorState.zeros(B, H, 4, 24, dtype=torch.float32, device=DEVICE)
    state.k_BHSF.fill_(float("nan"))
    state.v_BHSV.fill_(float("nan"))
    expected_o, expected_state = taylor_oracle(*in_double(q, k, v))
    assert_close(steps(q, k, v, state, backend), expected_o)
    assert_close(state.joined(), expected_state)
    buffered = 0 if backend == "reference" else T % (BUFFERED_KEYS + 1)
    assert (state.buffered_BH == buffered).all()


def test_heads_absorb_at_their_own_time():
    """Rows and heads with different numbers of buffered keys, as merged batches have."""
    T = BUFFERED_KEYS + 6
    q, k, v = (torch.randn(B, T, H, width, device=DEVICE) for width in (4, 4, 8))
    state = TaylorState.zeros(B, H, 4, 8, dtype=torch.float32, device=DEVICE)
    for b in range(B):
        for h in range(H):
            one = TaylorState.zeros(1, 1, 4, 8, dtype=torch.float32, device=DEVICE)
            here = tuple(x[b : b + 1, : 3 * b + 2 * h, h : h + 1] for x in (q, k, v))
            if here[0].shape[1]:
                steps(*here, one, "triton")
            for name, x in vars(one).items():
                vars(state)[name][b, h] = x[0, 0]
    expected_o, _ = taylor_oracle(*in_double(q, k, v))
    for t in range(BUFFERED_KEYS):
        at = torch.tensor([[3 * b + 2 * h + t for h in range(H)] for b in range(B)], device=DEVICE)
        now = [torch.take_along_dim(x, at[:, None, :, None], dim=1)[:, 0] for x in (q, k, v)]
        o = taylor_step(*now, state, backend="triton")
        assert_close(o, torch.take_along_dim(expected_o, at.cpu()[:, None, :, None], dim=1)[:, 0])


@BACKENDS
def test_the_reference_takes_over_buffered_keys(backend):
    q, k, v = views(4, 4, 8)
    state = TaylorState.zeros(B, H, 4, 8, dtype=torch.float32, device=DEVICE)
    first = steps(q[:, :4], k[:, :4], v[:, :4], state, "triton")
    o = torch.cat([first, steps(q[:, 4:], k[:, 4:], v[:, 4:], state, backend)], dim=1)
    assert_close(o, taylor_oracle(*in_double(q, k, v))[0])


@pytest.mark.parametrize("rows", [8, 64, 256])
def test_the_tile_of_a_taylor_step_does_not_matter(rows, monkeypatch):
    from based_megatron.kernels.decode import triton_taylor_step

    monkeypatch.setattr(triton_taylor_step, "TILE_ROWS", rows)
    q, k, v = views(16, 16, 24)
    state = TaylorState.zeros(B, H, 16, 24, dtype=torch.float32, device=DEVICE)
    *_, prefix = taylor_oracle(*in_double(*(x[:, : T - 2] for x in (q, k, v))))
    state.set_joined(prefix.to(DEVICE))
    o = torch.stack([taylor_step(q[:, t], k[:, t], v[:, t], state, backend="triton") for t in (-2, -1)], dim=1)
    assert_close(o, taylor_oracle(*in_double(q, k, v))[0][:, -2:])


@pytest.mark.parametrize("F", range(1, 33))
def test_the_kernel_finds_every_pair(F):
    """With an empty state, k picks out each row: its moment is the product of the pair."""
    k = torch.rand(1, 1, F, device=DEVICE) + 0.5
    v = torch.ones(1, 1, 1, device=DEVICE)
    state = TaylorState.zeros(1, 1, F, 1, dtype=torch.float32, device=DEVICE)
    for _ in range(BUFFERED_KEYS + 1):
        taylor_step(k, k, v, state, backend="triton")
    assert_close(state.joined()[..., -1], (BUFFERED_KEYS + 1) * moments(k.double().cpu()), 1e-6)


@BACKENDS
def test_a_long_count_is_exact(backend):
    """fp32 sums: a bf16 state would stop counting at 256 tokens."""
    q, k, v = (x.bfloat16() for x in views(8, 8, 24))
    state = TaylorState.zeros(B, H, 8, 24, dtype=torch.bfloat16, device=DEVICE)
    state.normaliser_BHR[..., -1] = 100_000  # the row of the constant
    taylor_step(q[:, 0], k[:, 0], v[:, 0], state, backend=backend)
    assert (state.joined()[..., 0, -1] == 100_001).all()


@BACKENDS
def test_taylor_steps_in_bf16_stay_near_fp64(backend):
    q, k, v = (x.bfloat16() for x in views(8, 8, 112))
    state = TaylorState.zeros(B, H, 8, 112, dtype=torch.bfloat16, device=DEVICE)
    o = steps(q, k, v, state, backend)
    assert o.dtype == torch.bfloat16
    assert_close(o, taylor_oracle(*in_double(q, k, v))[0], BF16)


# window


def rotated(x_BTHV: Tensor, first_B: Tensor, fraction: float) -> Tensor:
    positions_BT = first_B[:, None] + torch.arange(x_BTHV.shape[1])
    return apply_rotary(x_BTHV, *rotary_tables(positions_BT, x_BTHV.shape[-1], fraction, 100.0, torch.float64))


def run_window(backend, W, V, fraction, first_B, dtype=torch.float32, poison=float("nan")):
    """Steps from positions `first` on, over a ring that holds the W keys before: (o, expected o)."""
    q, k, v = (x.to(dtype) for x in views(V, V, V))
    state = WindowState.zeros(B, H, W, V, dtype=dtype, device=DEVICE)
    state.k_BHWV.fill_(poison)
    state.v_BHWV.fill_(poison)
    # Row b's sequence is `past` with its last first_B[b] tokens, then q, k, v.
    past = 12
    k_past, v_past = (torch.randn(B, past, H, V).to(dtype) for _ in range(2))
    k_rotated = rotated(k_past.double(), first_B - past, fraction)
    ids = (torch.arange(past) >= past - first_B[:, None]).int() - 1
    keep = ids[:, past - min(W, past) :, None, None] < 0  # what does not exist is poisoned
    last = (x[:, past - min(W, past) :].masked_fill(keep, poison).to(DEVICE, dtype) for x in (k_rotated, v_past))
    state.store(*last, first_B.to(DEVICE))
    position_B, outputs = first_B.to(DEVICE).clone(), []
    for t in range(T):
        cos_BR, sin_BR = rotary_tables(position_B, V, fraction, 100.0)
        outputs.append(window_step(q[:, t], k[:, t], v[:, t], cos_BR, sin_BR, state, position_B, backend=backend))
        position_B += 1
    q, k, v = in_double(q, k, v)
    q, k = rotated(q, first_B, fraction), rotated(k, first_B, fraction)
    ids = torch.nn.functional.pad(ids, (0, T))
    expected = attention_oracle(q, torch.cat([k_rotated, k], 1), torch.cat([v_past.double(), v], 1), W, ids)
    return torch.stack(outputs, dim=1), expected


@BACKENDS
@pytest.mark.parametrize(
    ("W", "V", "fraction"), [(5, 16, 1.0), (8, 24, 0.5), (1, 16, 1.0), (0, 16, 1.0), (7, 8, 0.0), (4, 112, 1.0)]
)
def test_window_steps_are_the_attention(backend, W, V, fraction):
    """Rows at different positions: one from its start, with NaN in every slot that was never written, one past a lap."""
    o, expected = run_window(backend, W, V, fraction, torch.tensor([0, 10]))
    assert_close(o, expected)


@pytest.mark.parametrize("keys", [1, 2, 16])
def test_the_tile_of_a_window_step_does_not_matter(keys, monkeypatch):
    from based_megatron.kernels.decode import triton_decode

    monkeypatch.setattr(triton_decode, "WINDOW_TILE_KEYS", keys)
    o, expected = run_window("triton", 8, 16, 1.0, torch.tensor([3, 11]))
    assert_close(o, expected)


@BACKENDS
def test_window_steps_in_bf16_stay_near_fp64(backend):
    o, expected = run_window(backend, 5, 16, 1.0, torch.tensor([2, 9]), torch.bfloat16)
    assert o.dtype == torch.bfloat16
    assert_close(o, expected, 3 * BF16)


@pytest.mark.parametrize("S", [1, 4, 5, 9])
def test_a_ring_returns_its_last_keys_in_order(S):
    """Starts differ, so that the ring wraps; ids of -1 mark what is before the start."""
    state = WindowState.zeros(2, 1, 4, 1, dtype=torch.float32, device=DEVICE)
    end_B = torch.tensor([3, 8], device=DEVICE)
    state.store(*(torch.full((2, 4, 1, 1), -7.0, device=DEVICE) for _ in range(2)), end_B - S)
    x = (end_B[:, None] - S + torch.arange(S, device=DEVICE)).float()[..., None, None]
    if S >= 4:
        state.store(x, -x, end_B)
    else:
        k, v, _ = state.last(end_B - S)
        state.store(torch.cat([k, x], 1), torch.cat([v, -x], 1), end_B)
    k, v, ids = state.last(end_B)
    expected = torch.tensor([[-1, 0, 1, 2], [4, 5, 6, 7]])
    assert ids.tolist() == [[-1, 0, 0, 0], [0, 0, 0, 0]]
    recent = (torch.arange(4) >= 4 - S) & (expected >= 0)
    assert torch.equal(k[..., 0, 0].cpu()[recent], expected[recent].float())
    assert torch.equal(v[..., 0, 0].cpu()[recent], -expected[recent].float())


# conv


@BACKENDS
@pytest.mark.parametrize(("K", "D"), [(1, 5), (2, 16), (3, 40), (4, 300)])
def test_conv_steps_are_the_convolution(backend, K, D):
    u, gate = (x.flatten(2) for x in views(D, D))
    weight = torch.randn(H * D, K, device=DEVICE)
    state = ConvState.zeros(B, K, H * D, dtype=torch.float32, device=DEVICE)
    y = torch.stack([conv_step(u[:, t], gate[:, t], weight, state, backend=backend) for t in range(T)], dim=1)
    assert_close(y, conv_oracle(*in_double(u, gate, weight)))
    assert torch.equal(state.inputs_BhD, u[:, T - (K - 1) :])


@pytest.mark.parametrize("sizes", [(9,), (1, 1, 7), (7, 1, 1), (8, 1)])
def test_a_conv_state_holds_the_last_inputs(sizes):
    u = torch.randn(B, T, 5, device=DEVICE)
    state = ConvState.zeros(B, 4, 5, dtype=torch.float32, device=DEVICE)
    for part in u.split(sizes, dim=1):
        state.store(part)
    assert torch.equal(state.inputs_BhD, u[:, -3:])


# token


@BACKENDS
@pytest.mark.parametrize("vocab_size", [1, 8191, 8192, 8193, 20_000])
def test_the_most_likely_token_is_chosen_and_never_padding(backend, vocab_size):
    """Padding is never chosen, whatever its logits are."""
    logits = torch.randn(5, 20_008, device=DEVICE)
    logits[:, vocab_size:] = 100.0
    logits[0, 0] = logits[1, vocab_size - 1] = 50.0
    token = torch.full((5,), -1, device=DEVICE)
    choose_token(logits, vocab_size, token, backend=backend)
    assert token.tolist() == logits[:, :vocab_size].argmax(-1).tolist()


def test_the_first_of_equal_tokens():
    logits = torch.zeros(1, 20_000, device=DEVICE)
    logits[0, [19_999, 8200 + 8192, 8200]] = 1.0  # the last two in one lane of the kernel
    token = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    choose_token(logits, 20_000, token, backend="triton")
    assert token.item() == 8200
