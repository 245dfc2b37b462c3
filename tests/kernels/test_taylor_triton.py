"""The Triton kernels of Taylor attention against the quadratic form in fp64: values, gradients, states, documents, layouts.

On a CPU they run in Triton's interpreter, at small sizes. Long sequences at the end need a GPU.

Legend: B batch, T tokens, H heads, F feature dim, V value head dim, R packed feature rows.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from kernel_oracles import (
    DEVICE,
    assert_same_gradients,
    document_ids,
    moments,
    segment_state,
    taylor_oracle,
    taylor_weights,
)
from torch import Tensor

from based_megatron.kernels.taylor_attention import taylor_attention, triton_attention
from based_megatron.kernels.taylor_attention.attention import Steps, TaylorAttention
from based_megatron.kernels.taylor_attention.triton_attention import Schedule

DOUBLE = torch.float64
# Relative to the largest entry, or to 1: the gradients of a query that sees only itself are zeros.
CLOSE = {"tolerance": 1e-5, "floor": 1.0}
TOKENS = (1, 15, 16, 17, 63, 64, 65, 129)
DOCUMENTS = ("none", "random", "chunk_starts", "single_tokens")
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


def small_schedule(chunk_tokens: int = 16, tile_tokens: int = 16, programs_wanted: int = 1000) -> Schedule:
    """Many chunks in few tokens; programs_wanted of 1 scans all in one segment, many cut it where there are 8 chunks."""
    tiles = {"scan_tokens": tile_tokens, "output_tokens": tile_tokens, "gradient_tokens": tile_tokens}
    return replace(Schedule(), chunk_tokens=chunk_tokens, programs_wanted=programs_wanted, **tiles)


def make_inputs(
    batch: int, tokens: int, feature_dim: int = 8, value_dim: int = 16, heads: int = 1, dtype=torch.float32
):
    """q, k, v and a state that earlier tokens could have left, in fp64 on the CPU, of numbers that `dtype` has too."""
    torch.manual_seed(tokens)
    q, k = torch.randn(2, batch, tokens, heads, feature_dim).to(dtype).double().unbind(0)
    v = torch.randn(batch, tokens, heads, value_dim).to(dtype).double()
    earlier_k, earlier_v = torch.randn(batch, 9, heads, feature_dim), torch.randn(batch, 9, heads, value_dim)
    state = segment_state(earlier_k, earlier_v).double()
    return tuple(x.requires_grad_() for x in (q, k, v, state))


def in_fp32(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors in fp32 on the kernels' device; integers stay what they are."""
    return [None if x is None else x.to(DEVICE, torch.float32 if x.is_floating_point() else x.dtype) for x in tensors]


def run_kernels(q, k, v, state, ids, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Output and final state, with gradients, on the kernels' device."""
    return TaylorAttention.apply(q, k, v, state, ids, Steps(triton_attention, schedule), True, None)


def triton(q, k, v, state, ids, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """The kernels in fp32, on fp64 tensors of the CPU: output and final state."""
    outputs = run_kernels(*in_fp32(q, k, v, state, ids), schedule)
    return tuple(x.cpu().double() for x in outputs)


def compare(batch: int, tokens: int, documents: str, schedule: Schedule, **sizes: int) -> None:
    q, k, v, state = make_inputs(batch, tokens, **sizes)
    ids = document_ids(documents, batch, tokens, schedule.chunk_tokens)
    outputs = triton(q, k, v, state, ids, schedule)
    assert_same_gradients(outputs, taylor_oracle(q, k, v, state, ids), (q, k, v, state), **CLOSE)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_quadratic_form(tokens: int, documents: str) -> None:
    """Values and gradients of all inputs, from both outputs at once."""
    compare(2, tokens, documents, small_schedule())


@pytest.mark.parametrize("programs_wanted", [1, 1000])
@pytest.mark.parametrize("documents", ["none", "random", "chunk_starts"])
def test_segments_that_are_scanned_at_once(documents: str, programs_wanted: int) -> None:
    """13 chunks in one segment or in three, the last one shorter; a state enters each from the one before."""
    compare(1, 195, documents, small_schedule(programs_wanted=programs_wanted))


def test_one_document_in_some_segments() -> None:
    """A document that ends in the first segment, one over whole segments, and one that starts in the last."""
    q, k, v, state = make_inputs(1, 195)
    ids = (torch.arange(195) >= 37).int() + (torch.arange(195) >= 180).int()
    outputs = triton(q, k, v, state, ids[None], small_schedule())
    assert_same_gradients(outputs, taylor_oracle(q, k, v, state, ids[None]), (q, k, v, state), **CLOSE)


@pytest.mark.parametrize("documents", ["none", "random"])
def test_tiles_smaller_than_a_chunk(documents: str) -> None:
    """Pairs of different tiles of one chunk."""
    compare(1, 81, documents, small_schedule(chunk_tokens=64, tile_tokens=16))


@pytest.mark.parametrize("documents", ["none", "random", "one_of_two"])
def test_pieces_that_exchange_moments_equal_the_whole(documents: str) -> None:
    """The entry points as ranks that share a sequence call them: moments are sent before the states that came are known."""
    q, k, v, _ = make_inputs(2, 280)
    ids = document_ids("random", 2, 280) if documents == "random" else None
    if documents == "one_of_two":  # one row's document goes on over the cut, the other's ends there
        ids = torch.stack([torch.zeros(280, dtype=torch.int32), (torch.arange(280) >= 150).int()])
    expected, _ = taylor_oracle(q, k, v, None, ids)
    do = torch.randn_like(expected)
    wanted = [expected, *torch.autograd.grad(expected, (q, k, v), do)]
    pieces, schedule = (slice(0, 150), slice(150, 280)), small_schedule()
    cut = [
        [None if x is None else x[:, piece] for x in in_fp32(q.detach(), k.detach(), v.detach(), do, ids)]
        for piece in pieces
    ]
    keys = [triton_attention.scan_keys(k, v, ids, schedule) for _, k, v, _, ids in cut]
    goes_on = torch.ones(2) if ids is None else (ids[:, 149] == ids[:, 150]).float()
    goes_on = goes_on.to(DEVICE)[:, None, None, None]
    states = [scan.states(initial) for scan, initial in zip(keys, (None, keys[0].moments() * goes_on), strict=True)]
    found, gradients = [], []
    for (q, k, v, do, ids), state in zip(cut, states, strict=True):
        o, inverse_z = triton_attention.attend(q, k, v, ids, state, schedule)
        gradients.append(triton_attention.output_gradients(do, o, inverse_z))
        found.append([o])
    queries = [triton_attention.scan_queries(x[0], *g, x[4], schedule) for x, g in zip(cut, gradients, strict=True)]
    adjoints = [scan.states(d) for scan, d in zip(queries, (queries[1].moments() * goes_on, None), strict=True)]
    for i, ((q, k, v, _, ids), (g, gz)) in enumerate(zip(cut, gradients, strict=True)):
        found[i].append(triton_attention.query_gradients(q, k, v, g, gz, ids, states[i], schedule))
        found[i].extend(triton_attention.key_gradients(q, k, v, g, gz, ids, adjoints[i], schedule))
    for got, want in zip(zip(*found, strict=True), wanted, strict=True):
        got = torch.cat(got, dim=1).cpu().double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * max(1.0, want.abs().max().item()))


@pytest.mark.parametrize(
    ("feature_dim", "value_dim", "documents"),
    [(16, 64, "random"), (16, 112, "none"), (24, 24, "random"), (32, 16, "chunk_starts"), (5, 16, "none")],
)
def test_head_dims_need_not_be_powers_of_two(feature_dim: int, value_dim: int, documents: str) -> None:
    compare(1, 37, documents, small_schedule(32, 32), feature_dim=feature_dim, value_dim=value_dim)


def test_the_default_schedule_and_several_heads() -> None:
    q, k, v, _ = make_inputs(2, 130, heads=2)
    ids = document_ids("random", 2, 130)
    o, final = taylor_attention(*in_fp32(q, k, v), document_ids_BT=in_fp32(ids)[0], backend="triton")
    assert final is None and o.shape == v.shape
    expected = taylor_oracle(q, k, v, None, ids)[:1]
    assert_same_gradients((o.cpu().double(),), expected, (q, k, v), **CLOSE)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("documents", ["none", "random"])
def test_either_output_may_go_unused(documents: str, used: int) -> None:
    """The final state alone, or the output alone."""
    q, k, v, state = make_inputs(2, 40)
    ids = document_ids(documents, 2, 40)
    leaves = (q, k, v, state)[used:]  # no gradient of the final state reaches q
    found = triton(q, k, v, state, ids, small_schedule())[used]
    assert_same_gradients((found,), taylor_oracle(q, k, v, state, ids)[used : used + 1], leaves, **CLOSE)


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_final_state_from_zero(documents: str) -> None:
    _, k, v, _ = make_inputs(2, 17)
    ids = document_ids(documents, 2, 17)
    state = segment_state(*in_fp32(k, v, ids), chunk_tokens=16, backend="triton").cpu().double()
    assert_same_gradients((state,), taylor_oracle(k, k, v, None, ids)[1:], (k, v), **CLOSE)


def test_states_of_pieces_add_up() -> None:
    """The public layout: a state of one piece is the initial state of the next, in either backend."""
    q, k, v, _ = (x.detach() for x in make_inputs(1, 50, feature_dim=16))
    pieces = [slice(0, 21), slice(21, 50)]
    state = segment_state(*in_fp32(k[:, pieces[0]], v[:, pieces[0]]), backend="triton")
    rest = [x[:, pieces[1]] for x in (q, k, v)]
    o, final = taylor_attention(*in_fp32(*rest), initial_state_BHRV=state, return_final_state=True, backend="triton")
    expected, expected_final = taylor_oracle(q, k, v)
    torch.testing.assert_close(o.cpu().double(), expected[:, pieces[1]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final.cpu().double(), expected_final, rtol=1e-5, atol=1e-5)


def test_views_of_a_fused_projection() -> None:
    """[T, B, ..] as training has it, cut into q, k and v; the gradient of the output is expanded or transposed."""
    torch.manual_seed(0)
    B, T, H, F, V = 2, 37, 2, 8, 16
    fused = torch.randn(T, B, H * (2 * F + V), dtype=DOUBLE, requires_grad=True)

    def parts(x: Tensor) -> list[Tensor]:
        x_BTE = x.transpose(0, 1)
        split = x_BTE.split([H * F, H * F, H * V], dim=-1)
        return [part.unflatten(-1, (H, -1)) for part in split]

    expected = taylor_oracle(*parts(fused))[0]
    found = taylor_attention(*parts(fused.to(DEVICE, torch.float32)), chunk_tokens=16, backend="triton")[0]
    assert found.transpose(0, 1).is_contiguous(), "memory order of the inputs"
    for reduce in (torch.sum, lambda o: (o.transpose(0, 1) * torch.arange(T)[:, None, None, None]).sum()):
        (grad,) = torch.autograd.grad(reduce(found.cpu().double()), fused, retain_graph=True)
        (wanted,) = torch.autograd.grad(reduce(expected), fused, retain_graph=True)
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    # Dense vectors are all that the kernels ask for: a last dimension with a stride is copied.
    spread = [x.detach().to(DEVICE, torch.float32).repeat_interleave(2, dim=-1)[..., ::2] for x in parts(fused)]
    assert torch.equal(taylor_attention(*spread, chunk_tokens=16, backend="triton")[0], found)


def test_one_row_of_document_ids_serves_the_whole_batch() -> None:
    q, k, v, state = in_fp32(*(x.detach() for x in make_inputs(3, 37)))
    ids = document_ids("random", 1, 37).to(DEVICE)
    shared, repeated = (run_kernels(q, k, v, state, rows, small_schedule()) for rows in (ids, ids.repeat(3, 1).long()))
    assert all(torch.equal(a, b) for a, b in zip(shared, repeated, strict=True))


@pytest.mark.parametrize("changed", [0, 15, 16, 30])
def test_outputs_do_not_depend_on_later_tokens(changed: int) -> None:
    q, k, v, _ = in_fp32(*(x.detach() for x in make_inputs(1, 40)))
    before, _ = taylor_attention(q, k, v, chunk_tokens=16, backend="triton")
    k[:, changed] += 1
    v[:, changed] += 1
    after, _ = taylor_attention(q, k, v, chunk_tokens=16, backend="triton")
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert ((before - after)[:, changed:].abs().amax((0, 2, 3)) > 1e-6).all()


def test_same_bits_run_to_run() -> None:
    leaves = [x.detach().requires_grad_() for x in in_fp32(*make_inputs(2, 70))]
    ids = document_ids("random", 2, 70).to(DEVICE)

    def run() -> list[Tensor]:
        outputs = run_kernels(*leaves, ids, small_schedule())
        return [*outputs, *torch.autograd.grad(sum(x.sin().sum() for x in outputs), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtypes", [(torch.float64,) * 3, (torch.float32, torch.float32, torch.bfloat16)])
def test_other_dtypes_are_refused(dtypes: tuple[torch.dtype, ...]) -> None:
    q, k, v, _ = make_inputs(1, 2)
    q, k, v = (x.to(DEVICE, dtype) for x, dtype in zip((q, k, v), dtypes, strict=True))
    with pytest.raises(TypeError, match=r"Triton kernels take one .*train.backend.*reference"):
        taylor_attention(q, k, v, backend="triton")


def test_chunks_that_the_kernels_cannot_tile_are_refused() -> None:
    q, k, v, _ = in_fp32(*make_inputs(1, 2))
    with pytest.raises(ValueError, match="chunk_tokens is 24"):
        taylor_attention(q, k, v, chunk_tokens=24, backend="triton")


# bf16; on a GPU long sequences and the sizes of the models.

LIMITS = {"o": 3e-3, "final state": 3e-3, "dq": 5e-3, "dk": 4e-3, "dv": 4e-3, "dinitial": 5e-3}
"""Relative L2 errors in bf16."""


def relative(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want).norm() / want.norm()).detach())


def bf16_errors(tokens: int, value_dim: int, documents: bool, batch: int = 2, heads: int = 2) -> dict[str, float]:
    """Errors of outputs and gradients, against the reference in fp64."""
    inputs = make_inputs(batch, tokens, 16, value_dim, heads, dtype=torch.bfloat16)
    exact = [x.detach().to(DEVICE).requires_grad_() for x in inputs]
    own = [x.detach().to(torch.bfloat16 if i < 3 else torch.float32).requires_grad_() for i, x in enumerate(exact)]
    ids = None
    if documents:
        share = max(4 / tokens, 0.002)
        ids = (torch.rand(batch, tokens, device=DEVICE) < share).int().cumsum(1)
    options = {"document_ids_BT": ids, "return_final_state": True}
    found = taylor_attention(*own[:3], initial_state_BHRV=own[3], backend="triton", **options)
    wanted = taylor_attention(*exact[:3], initial_state_BHRV=exact[3], backend="reference", **options)
    # The final state's part of the loss is scaled down to that of the outputs: its gradients would hide theirs.
    cotangents = [torch.randn_like(wanted[0]).bfloat16(), torch.randn_like(wanted[1]).float() / tokens]
    grads = torch.autograd.grad(found, own, cotangents)
    wanted_grads = torch.autograd.grad(wanted, exact, [x.double() for x in cotangents])
    pairs = zip([*found, *grads], [*wanted, *wanted_grads], strict=True)
    return dict(zip(LIMITS, (relative(*pair) for pair in pairs), strict=True))


@pytest.mark.parametrize(
    ("tokens", "value_dim", "documents"),
    [
        (17, 64, True),
        (65, 112, False),
        *(
            pytest.param(*case, marks=[needs_gpu, pytest.mark.gpu])
            for case in itertools.product([*TOKENS[1:], 2048, 131_072], [64, 112], [False, True])
        ),
    ],
)
def test_bf16_errs_no_more_than_the_limits(tokens: int, value_dim: int, documents: bool) -> None:
    rows = 2 if DEVICE.type == "cuda" else 1  # the interpreter is slow
    errors = bf16_errors(tokens, value_dim, documents, rows, rows)
    assert all(error <= LIMITS[name] for name, error in errors.items()), errors


@pytest.mark.parametrize("value_dim", [64, 112])
def test_a_single_token_in_bf16(value_dim: int) -> None:
    """Without a state its output is its value, and dq and dk are zeros but for roundings."""
    q, k, v, _ = (x.detach().to(DEVICE, torch.bfloat16).requires_grad_() for x in make_inputs(2, 1, 16, value_dim, 2))
    o, _ = taylor_attention(q, k, v, backend="triton")
    cotangent = torch.randn_like(o)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), cotangent)
    assert relative(o, v.double()) <= LIMITS["o"] and relative(dv, cotangent.double()) <= LIMITS["dv"]
    assert max(dq.abs().max(), dk.abs().max()) <= 0.05


def test_a_running_state_in_bf16_would_be_seen() -> None:
    """The limit at 131072 tokens catches a state that is rounded after every chunk: it errs far beyond.

    bf16 has 8 binary digits: from 2^15 on a count cannot grow by the 128 tokens of a chunk.
    """
    T, C, F, V = 131_072, 128, 16, 16
    torch.manual_seed(0)
    q, k, v = torch.randn(T, F), torch.randn(T, F), torch.randn(T, V + 1)
    v[:, -1] = 1
    errors, exact, rounded = [], torch.zeros(1), torch.zeros(1)
    weights = taylor_weights(F).float()
    for start in range(0, T, C):
        chunk = slice(start, start + C)
        if start >= T - 8 * C:  # the last chunks read what both states have come to
            read = moments(q[chunk]) * weights
            (num, den), (own_num, own_den) = ((x[:, :-1], x[:, -1:]) for x in (read @ exact, read @ rounded))
            errors.append(relative(own_num / own_den, (num / den).double()))
        added = moments(k[chunk]).T @ v[chunk]
        exact, rounded = exact + added, (rounded + added).bfloat16().float()
    assert min(errors) > 10 * LIMITS["o"], errors
