"""Token by token forms of the recurrences, in fp64, straight from the definitions.

Legend: B batch, T tokens, H heads, F feature dim, V value head dim, C channels.
"""

import torch
from torch import Tensor


def starts_of(ids_BT: Tensor | None, t: int) -> Tensor | float:
    """[B or 1] factors: 0 where token t starts a document, so that what was before is forgotten."""
    return 1.0 if ids_BT is None or t == 0 else (ids_BT[:, t] == ids_BT[:, t - 1]).double()


def dplr_oracle(q, k, v, a, b, w, state=None, ids=None) -> tuple[Tensor, Tensor]:
    """S <- diag(e^w) S + b (a^T S) + k v^T, and q^T S."""
    B, T, H, F = q.shape
    S = q.new_zeros(B, H, F, v.shape[-1]) if state is None else state
    outputs = []
    for t in range(T):
        keep = starts_of(ids, t)
        S = S * (keep if isinstance(keep, float) else keep[:, None, None, None])
        read = torch.einsum("bhf,bhfv->bhv", a[:, t], S)
        S = w[:, t].exp()[..., None] * S
        S = S + torch.einsum("bhf,bhv->bhfv", b[:, t], read) + torch.einsum("bhf,bhv->bhfv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhf,bhfv->bhv", q[:, t], S))
    return torch.stack(outputs, dim=1), S


def delta_oracle(q, k, v, beta, g=None, state=None, ids=None) -> tuple[Tensor, Tensor]:
    """S <- e^g S, then the value under the key k is replaced, by the share beta, by v."""
    B, T, H, F = q.shape
    S = q.new_zeros(B, H, F, v.shape[-1]) if state is None else state
    outputs = []
    for t in range(T):
        keep = starts_of(ids, t)
        S = S * (keep if isinstance(keep, float) else keep[:, None, None, None])
        if g is not None:
            S = S * g[:, t].exp()[..., None, None]
        old = torch.einsum("bhf,bhfv->bhv", k[:, t], S)
        S = S + torch.einsum("bhf,bhv->bhfv", k[:, t], beta[:, t, :, None] * (v[:, t] - old))
        outputs.append(torch.einsum("bhf,bhfv->bhv", q[:, t], S))
    return torch.stack(outputs, dim=1), S


def wkv_oracle(k, v, u, w, ids=None) -> Tensor:
    """Weighted averages over all pairs of tokens."""
    T = k.shape[1]
    outputs = []
    for t in range(T):
        exponents = [(t - 1 - j) * w + k[:, j] for j in range(t)] + [u + k[:, t]]
        exponents = torch.stack(exponents, dim=1)
        if ids is not None:
            exponents = exponents.masked_fill((ids[:, : t + 1] != ids[:, t, None])[..., None], -torch.inf)
        outputs.append((exponents.softmax(1) * v[:, : t + 1]).sum(1))
    return torch.stack(outputs, dim=1)
