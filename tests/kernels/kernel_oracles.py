"""Naive forms of the ops: every pair of tokens, straight from the definitions, with autograd's own gradients.

Legend: B batch, T queries, S keys, H heads, F feature dim, V value head dim, D channels, K taps, R packed rows.
"""

from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from based_megatron.kernels.taylor_attention import taylor_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""The device that kernels run on: conftest.py hides the GPUs unless BASED_TEST_DEVICE=cuda, and has Triton interpreted then."""


def taylor_oracle(
    q_BTHF: Tensor, k_BTHF: Tensor, v_BTHV: Tensor, state_BHRV: Tensor | None = None, ids_BT: Tensor | None = None,
    square: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and final state in O(T^2)."""
    B, T, H, F = q_BTHF.shape
    ids_BT = torch.zeros(B, T, dtype=torch.int64) if ids_BT is None else ids_BT
    v_BTHE = torch.cat([v_BTHV, torch.ones_like(v_BTHV[..., :1])], dim=-1)
    s_BHTT = torch.einsum("bihf,bjhf->bhij", q_BTHF, k_BTHF) / F**0.5
    visible_BTT = (ids_BT[:, :, None] == ids_BT[:, None]) & torch.ones(T, T, dtype=torch.bool).tril()
    w_BHTT = (s_BHTT**2 if square else 1 + s_BHTT + s_BHTT**2 / 2).masked_fill(~visible_BTT[:, None], 0)
    total_BTHE = torch.einsum("bhij,bjhe->bihe", w_BHTT, v_BTHE)
    in_last_BT = (ids_BT == ids_BT[:, -1:]).to(v_BTHE.dtype)
    final_BHRE = torch.einsum(
        "bth,bthr,bthe->bhre", in_last_BT[..., None].expand(B, T, H), moments(k_BTHF, square), v_BTHE
    )
    if state_BHRV is not None:
        in_first_BT = (ids_BT == ids_BT[:, :1]).to(v_BTHE.dtype)
        weighted_BTHR = moments(q_BTHF, square) * taylor_weights(F, square).to(q_BTHF.dtype)
        read_BTHE = torch.einsum("bthr,bhre->bthe", weighted_BTHR, state_BHRV)
        total_BTHE = total_BTHE + read_BTHE * in_first_BT[..., None, None]
        final_BHRE = final_BHRE + state_BHRV * (ids_BT[:, 0] == ids_BT[:, -1])[:, None, None, None]
    return total_BTHE[..., :-1] / (total_BTHE[..., -1:] + (1e-5 if square else 0)), final_BHRE


def moments(x: Tensor, square: bool = False) -> Tensor:
    """[1 | x_a | x_a x_b for a <= b], or the last of these alone, entry by entry."""
    pairs = [x[..., a] * x[..., b] for a, b in combinations_with_replacement(range(x.shape[-1]), 2)]
    return torch.stack(pairs if square else [torch.ones_like(x[..., 0]), *x.unbind(-1), *pairs], dim=-1)


def taylor_weights(feature_dim: int, square: bool = False) -> Tensor:
    """Coefficients of 1 + s + s^2/2, or of s^2, in the moments of q and k, with s = q.k / sqrt(F)."""
    F = feature_dim
    if square:
        return torch.tensor(
            [1 / F if a == b else 2 / F for a, b in combinations_with_replacement(range(F), 2)]
        ).double()
    pairs = [1 / (2 * F) if a == b else 1 / F for a, b in combinations_with_replacement(range(F), 2)]
    return torch.tensor([1.0] + [F**-0.5] * F + pairs, dtype=torch.float64)


def segment_state(k_BTHF: Tensor, v_BTHV: Tensor, ids_BT: Tensor | None = None, **options: Any) -> Tensor:
    """The moments of the tokens in the last token's document: the final state of `taylor_attention` from a zero state."""
    _, state = taylor_attention(k_BTHF, k_BTHF, v_BTHV, document_ids_BT=ids_BT, return_final_state=True, **options)
    assert state is not None
    return state


def recurrent_step(
    q_BHF: Tensor, k_BHF: Tensor, v_BHV: Tensor, state_BHRV: Tensor, square: bool = False
) -> tuple[Tensor, Tensor]:
    """Output and state of one more token: (k, v) is added to the state, which q then reads."""
    v_BHE = torch.cat([v_BHV, torch.ones_like(v_BHV[..., :1])], dim=-1)
    state_BHRV = state_BHRV + moments(k_BHF, square).unsqueeze(-1) * v_BHE.unsqueeze(-2)
    read_BHR = moments(q_BHF, square) * taylor_weights(q_BHF.shape[-1], square).to(q_BHF.dtype)
    total_BHE = torch.einsum("bhr,bhre->bhe", read_BHR, state_BHRV)
    return total_BHE[..., :-1] / (total_BHE[..., -1:] + (1e-5 if square else 0)), state_BHRV


def attention_oracle(
    q_BTHV: Tensor, k_BSHV: Tensor, v_BSHV: Tensor, window_left: int | None, ids_BS: Tensor | None
) -> Tensor:
    """Masked softmax attention over all T x S pairs; a window of None is the whole past."""
    T, S = q_BTHV.shape[1], k_BSHV.shape[1]
    distance_TS = (torch.arange(T) + S - T)[:, None] - torch.arange(S)
    visible = distance_TS >= 0
    if window_left is not None:
        visible = visible & (distance_TS <= window_left)
    if ids_BS is not None:
        visible = visible & (ids_BS[:, S - T :, None] == ids_BS[:, None]) & (ids_BS >= 0)[:, None]
    else:
        visible = visible[None]
    scores_BHTS = torch.einsum("bihv,bjhv->bhij", q_BTHV, k_BSHV) * q_BTHV.shape[-1] ** -0.5
    p_BHTS = scores_BHTS.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhv->bihv", p_BHTS, v_BSHV)


def conv_oracle(
    u_BTD: Tensor,
    gate_BTD: Tensor | float,
    weight_DK: Tensor,
    halo_BhD: Tensor | None = None,
    ids_BS: Tensor | None = None,
    bias_D: Tensor | float = 0.0,
) -> Tensor:
    """The gated convolution, one token and one tap at a time."""
    u_BSD = u_BTD if halo_BhD is None else torch.cat([halo_BhD, u_BTD], dim=1)
    S, T, K = u_BSD.shape[1], u_BTD.shape[1], weight_DK.shape[1]
    outputs = []
    for position in range(S - T, S):
        c_BD = torch.zeros_like(u_BTD[:, 0]) + bias_D
        for back in range(min(K, position + 1)):
            term_BD = u_BSD[:, position - back] * weight_DK[:, K - 1 - back]
            if ids_BS is not None:
                seen_B = (ids_BS[:, position - back] == ids_BS[:, position]) & (ids_BS[:, position - back] >= 0)
                term_BD = term_BD * seen_B[:, None]
            c_BD = c_BD + term_BD
        outputs.append(c_BD / (1 + torch.exp(-c_BD)))
    return torch.stack(outputs, dim=1) * gate_BTD


def document_ids(kind: str, batch: int, tokens: int, chunk_tokens: int = 16) -> Tensor | None:
    """Ids [B, T] that never decrease; rows differ."""
    if kind == "none":
        return None
    if kind == "single_tokens":
        return torch.arange(tokens).expand(batch, tokens)
    if (
        kind == "chunk_starts"
    ):  # a document starts exactly on each chunk boundary in row 0, one token later in row 1, ...
        return torch.stack(
            [(torch.arange(tokens) - row).div(chunk_tokens, rounding_mode="floor") for row in range(batch)]
        )
    assert kind == "random"
    generator = torch.Generator().manual_seed(tokens)
    return (torch.rand(batch, tokens, generator=generator) < 0.12).int().cumsum(1) + 3


def assert_same_gradients(outputs, expected, inputs, tolerance: float, floor: float = 1e-3) -> None:
    """Outputs and the gradients of a random projection of them agree, relative to the largest entry of each.

    The error of a tensor without entries of size `floor` is relative to that: where terms cancel, only roundings are left.
    """
    cotangents = [torch.randn_like(x) for x in expected]
    grads = torch.autograd.grad(outputs, inputs, cotangents)
    expected_grads = torch.autograd.grad(expected, inputs, cotangents)
    for name, got, want in zip(
        [*(f"output {i}" for i in range(len(expected))), *(f"gradient {i}" for i in range(len(inputs)))],
        [*outputs, *grads],
        [*expected, *expected_grads],
        strict=True,
    ):
        assert got.shape == want.shape, name
        error = (got - want).abs().max() / want.abs().max().clamp_min(floor)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def saved_elements(op: Callable[[], object]) -> int:
    """Elements of all tensors that `op` saves for its backward pass."""
    saved: list[int] = []

    def count(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        op()
    return sum(saved)


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out
