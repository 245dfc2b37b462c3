"""Attention by squares alone, the form of ReBased: both backends and the decoding step against the quadratic form in fp64.

The steps are those of Taylor attention, whose own tests go through every size and layout; here is what differs.
"""

from dataclasses import replace

import pytest
import torch
from kernel_oracles import DEVICE, assert_same_gradients, document_ids, taylor_oracle
from torch import Tensor
from torch.nn import functional

from based_megatron.kernels.decode import BUFFERED_KEYS, TaylorState, taylor_step
from based_megatron.kernels.packing import packed_rows
from based_megatron.kernels.taylor_attention import taylor_attention, triton_attention
from based_megatron.kernels.taylor_attention.attention import Steps, TaylorAttention

CHUNK_TOKENS = 16


def make_inputs(batch: int, tokens: int, feature_dim: int = 8, value_dim: int = 16, heads: int = 1):
    """Normed q and k, v, and a state that earlier tokens could have left, in fp64 with gradients."""
    torch.manual_seed(tokens)
    q, k = functional.layer_norm(torch.randn(2, batch, tokens + 9, heads, feature_dim).double(), (feature_dim,))
    v = torch.randn(batch, tokens + 9, heads, value_dim).double()
    _, state = taylor_oracle(*(x[:, :9] for x in (q, k, v)), square=True)
    return tuple(x.detach().requires_grad_() for x in (q[:, 9:], k[:, 9:], v[:, 9:], state))


def triton(q: Tensor, k: Tensor, v: Tensor, state: Tensor, ids: Tensor | None) -> tuple[Tensor, ...]:
    """Output and final state of the kernels in fp32, with many chunks in few tokens."""
    small = {"scan_tokens": 16, "output_tokens": 16, "gradient_tokens": 16, "programs_wanted": 1000}
    schedule = replace(triton_attention.Schedule(), square=True, chunk_tokens=CHUNK_TOKENS, **small)
    inputs = (x.to(DEVICE, torch.float32) for x in (q, k, v, state))
    ids = None if ids is None else ids.to(DEVICE)
    outputs = TaylorAttention.apply(*inputs, ids, Steps(triton_attention, schedule), True, None)
    return tuple(x.cpu().double() for x in outputs)


@pytest.mark.parametrize("documents", ["none", "random"])
@pytest.mark.parametrize("tokens", [1, 16, 65])
def test_the_reference_equals_the_quadratic_form(tokens: int, documents: str) -> None:
    q, k, v, state = make_inputs(3, tokens, heads=2)
    ids = document_ids(documents, 3, tokens)
    outputs = taylor_attention(
        q, k, v, initial_state_BHRV=state, document_ids_BT=ids, return_final_state=True, square=True, chunk_tokens=16
    )
    assert_same_gradients(outputs, taylor_oracle(q, k, v, state, ids, square=True), (q, k, v, state), 1e-11)


@pytest.mark.parametrize(
    ("tokens", "documents", "feature_dim", "value_dim"),
    [
        (1, "none", 8, 16),
        (17, "random", 8, 16),
        (195, "none", 8, 16),
        (195, "random", 8, 16),
        (37, "random", 5, 24),
        (37, "chunk_starts", 16, 64),
        (37, "none", 24, 16),
    ],
)
def test_the_kernels_equal_the_quadratic_form(tokens: int, documents: str, feature_dim: int, value_dim: int) -> None:
    q, k, v, state = make_inputs(1, tokens, feature_dim, value_dim)
    ids = document_ids(documents, 1, tokens, CHUNK_TOKENS)
    expected = taylor_oracle(q, k, v, state, ids, square=True)
    assert_same_gradients(triton(q, k, v, state, ids), expected, (q, k, v, state), tolerance=1e-5, floor=1.0)


def test_a_state_has_pairs_of_features_only() -> None:
    q, k, v, _ = make_inputs(1, 5, feature_dim=4)
    _, state = taylor_attention(q, k, v, return_final_state=True, square=True)
    assert state.shape[2] == packed_rows(4, square=True) == 10
    torch.testing.assert_close(state[0, 0, 1, -1], (k[0, :, 0, 0] * k[0, :, 0, 1]).sum())


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_query_that_no_key_resembles_gives_zeros(backend: str) -> None:
    """Without the epsilon it would be 0 / 0."""
    q, k, v = (torch.zeros(1, 3, 1, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    o, _ = taylor_attention(q, k, v + 1, square=True, backend=backend)
    gradients = torch.autograd.grad(o.sum(), (q, k, v))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in (o, *gradients))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("feature_dim", "value_dim"), [(8, 24), (5, 16)])
def test_steps_of_decoding_are_the_attention(backend: str, feature_dim: int, value_dim: int) -> None:
    """From a state of earlier tokens on, past a full buffer of keys; places that were never written hold NaN."""
    q, k, v, before = (x.detach() for x in make_inputs(2, BUFFERED_KEYS + 3, feature_dim, value_dim, heads=2))
    expected, expected_state = taylor_oracle(q, k, v, before, square=True)
    state = TaylorState.zeros(2, 2, feature_dim, value_dim, dtype=torch.float32, device=DEVICE, square=True)
    state.k_BHSF.fill_(float("nan"))
    state.v_BHSV.fill_(float("nan"))
    state.set_joined(before.to(DEVICE, torch.float32))
    inputs = [x.to(DEVICE, torch.float32) for x in (q, k, v)]
    steps = [taylor_step(*(x[:, t] for x in inputs), state, backend=backend) for t in range(q.shape[1])]
    for got, want in ((torch.stack(steps, dim=1), expected), (state.joined(), expected_state)):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("tokens", [65, 2048, 65_536])
def test_the_kernels_in_bf16(tokens: int, documents: bool) -> None:
    """Against the reference in fp64, relative L2 errors of outputs and gradients."""
    exact = [x.detach().bfloat16().double().to(DEVICE) for x in make_inputs(2, tokens, 16, 64, heads=2)[:3]]
    own = [x.bfloat16().requires_grad_() for x in exact]
    exact = [x.requires_grad_() for x in exact]
    ids = (torch.rand(2, tokens, device=DEVICE) < 0.002).int().cumsum(1) if documents else None
    found, _ = taylor_attention(*own, document_ids_BT=ids, square=True, backend="triton")
    wanted, _ = taylor_attention(*exact, document_ids_BT=ids, square=True, backend="reference")
    cotangent = torch.randn_like(wanted).bfloat16()
    gradients = torch.autograd.grad(found, own, cotangent), torch.autograd.grad(wanted, exact, cotangent.double())
    pairs = [(found, wanted), *zip(*gradients, strict=True)]
    errors = [float((got.double() - want).norm() / want.norm()) for got, want in pairs]
    assert max(errors) <= 1e-2, dict(zip(("o", "dq", "dk", "dv"), errors, strict=True))


@pytest.mark.slow
def test_the_reference_equals_that_of_flash_linear_attention() -> None:
    """Both of its sums, since it divides by the second one plus 1e-6."""
    naive = pytest.importorskip("fla.ops.rebased.naive").naive_parallel_rebased
    q, k, v, _ = make_inputs(2, 40, heads=3)
    ours, _ = taylor_attention(q, k, v, square=True)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    total, z = (
        naive(*heads_first[:2], values, use_norm=False)
        for values in (heads_first[2], torch.ones_like(v[..., :1]).transpose(1, 2))
    )
    theirs = (total / (z + 1e-5)).transpose(1, 2)
    assert_same_gradients((ours,), (theirs,), (q, k, v), 1e-11)
