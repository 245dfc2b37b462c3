"""Linear attention with a prefix that all tokens see (JRT) against a masked quadratic form in fp64: values and gradients.

Legend: B batch, T tokens, H heads.
"""

import functools

import pytest
import torch
from kernel_oracles import DEVICE, assert_same_gradients, document_ids
from torch import Tensor
from torch.nn import functional

from based_megatron.kernels.taylor_attention import taylor_attention, taylor_moments

PREFIX_TOKENS = 21


def make_inputs(tokens: int) -> tuple[Tensor, ...]:
    """q, k, v, and the keys and values of the prefix, in fp64 with gradients."""
    torch.manual_seed(tokens)
    q, k, prefix_k = torch.randn(3, 2, tokens, 2, 8).double()
    v, prefix_v = torch.randn(2, 2, tokens, 2, 16).double()
    prefix = (x[:, :PREFIX_TOKENS] for x in (prefix_k, prefix_v))
    return tuple(x.clone().requires_grad_() for x in (q, k, v, *prefix))


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, ids: Tensor | None, square: bool
) -> Tensor:
    """Both sums pair by pair: causal within documents, and all pairs with the prefix of the first document."""
    B, T = q.shape[:2]
    M = prefix_k.shape[1]
    ids = torch.zeros(B, T, dtype=torch.int64) if ids is None else ids
    same_BTT = ids[:, :, None] == ids[:, None]
    causal_BTT = same_BTT & torch.ones(T, T, dtype=torch.bool).tril()
    in_first_BT = ids == ids[:, :1]
    prefix_BTT = in_first_BT[:, :, None] & in_first_BT[:, None, :M]
    total, z = 0, 0
    for keys, values, seen in ((k, v, causal_BTT), (prefix_k, prefix_v, prefix_BTT)):
        s_BHTT = torch.einsum("bihf,bjhf->bhij", q, keys) / q.shape[-1] ** 0.5
        w_BHTT = (s_BHTT**2 if square else 1 + s_BHTT + s_BHTT**2 / 2) * seen[:, None]
        total = total + torch.einsum("bhij,bjhv->bihv", w_BHTT, values)
        z = z + w_BHTT.sum(-1).transpose(1, 2)[..., None]
    return total / (z + (1e-5 if square else 0))


def with_prefix(
    inputs: tuple[Tensor, ...], ids: Tensor | None, square: bool, backend: str, chunk_tokens: int | None = None
) -> Tensor:
    q, k, v, prefix_k, prefix_v = inputs
    options = {"square": square, "backend": backend, "chunk_tokens": chunk_tokens}
    prefix_ids = None if ids is None else ids[:, : prefix_k.shape[1]]
    state = taylor_moments(prefix_k, prefix_v, document_ids_BT=prefix_ids, **options)
    return taylor_attention(q, k, v, initial_state_BHRV=state, document_ids_BT=ids, **options)[0]


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("documents", ["none", "random", "chunk_starts"])
@pytest.mark.parametrize("tokens", [5, PREFIX_TOKENS, 50])
def test_the_reference_equals_the_quadratic_form(tokens: int, documents: str, square: bool) -> None:
    """Sequences shorter and longer than the prefix, and documents that end inside of it."""
    inputs, ids = make_inputs(tokens), document_ids(documents, 2, tokens)
    found = with_prefix(inputs, ids, square, "reference", chunk_tokens=8)
    assert_same_gradients((found,), (quadratic(*inputs, ids, square),), inputs, 1e-11)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("documents", ["none", "random"])
def test_the_kernels_equal_the_quadratic_form(documents: str, square: bool) -> None:
    inputs, ids = make_inputs(50), document_ids(documents, 2, 50)
    own = tuple(x.to(DEVICE, torch.float32) for x in inputs)
    found = with_prefix(own, None if ids is None else ids.to(DEVICE), square, "triton", chunk_tokens=16)
    expected = quadratic(*inputs, ids, square)
    assert_same_gradients((found.cpu().double(),), (expected,), inputs, 2e-5, floor=1.0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("square", [False, True])
def test_the_kernels_in_bf16(square: bool, documents: bool) -> None:
    """Prefixes of 1024 of 2048 tokens, against the reference in fp64: relative L2 errors of outputs and gradients."""
    torch.manual_seed(0)
    B, T, H, F, V, M = 2, 2048, 4, 16, 64, 1024
    q, k, prefix_k = torch.randn(3, B, T, H, F, device=DEVICE)
    if square:
        q, k, prefix_k = (functional.layer_norm(x, (F,)) for x in (q, k, prefix_k))
    v, prefix_v = torch.randn(2, B, T, H, V, device=DEVICE)
    own = tuple(x.bfloat16().requires_grad_() for x in (q, k, v, prefix_k[:, :M], prefix_v[:, :M]))
    exact = tuple(x.detach().double().requires_grad_() for x in own)
    ids = (torch.rand(B, T, device=DEVICE) < 0.002).int().cumsum(1) if documents else None
    found = with_prefix(own, ids, square, "triton")
    wanted = with_prefix(exact, ids, square, "reference")
    cotangent = torch.randn_like(wanted).bfloat16()
    gradients = torch.autograd.grad(found, own, cotangent), torch.autograd.grad(wanted, exact, cotangent.double())
    pairs = [(found, wanted), *zip(*gradients, strict=True)]
    errors = [float((got.double() - want).norm() / want.norm()) for got, want in pairs]
    assert max(errors) <= 1e-2, dict(zip(("o", "dq", "dk", "dv", "dk'", "dv'"), errors, strict=True))


def test_gradients_of_moments_are_those_of_the_definition() -> None:
    *_, k, v = make_inputs(7)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3, 3]])
    moments = functools.partial(taylor_moments, document_ids_BT=ids, chunk_tokens=3)
    # Along random directions: the whole Jacobian has millions of entries.
    assert torch.autograd.gradcheck(moments, (k, v), fast_mode=True)
