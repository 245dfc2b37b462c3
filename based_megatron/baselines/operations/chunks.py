"""Sequences in chunks, and which tokens of packed documents see each other and the states between chunks.

Legend: B sequences, T tokens, H heads, N chunks of C tokens, K key dim, V value head dim, X any last dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Chunks:
    """Sequences of `tokens` tokens in chunks, the last one filled up with tokens that are nothing, and the documents in them."""

    tokens: int
    size: int
    """Tokens C of a chunk."""
    ids_BNC: Tensor
    """Document ids; the filling belongs to the last document."""

    @classmethod
    def of(cls, like_BT: Tensor, size: int, document_ids_BT: Tensor | None) -> "Chunks":
        """The chunks of sequences of that shape and device. Without ids, a sequence is one document."""
        batch, tokens = like_BT.shape[:2]
        if document_ids_BT is None:
            document_ids_BT = torch.zeros(1, tokens, dtype=torch.int32, device=like_BT.device).expand(batch, -1)
        size = min(size, tokens)
        filling = -tokens % size
        ids = torch.cat([document_ids_BT, document_ids_BT[:, -1:].expand(-1, filling)], dim=1)
        return cls(tokens, size, ids.unflatten(1, (-1, size)))

    @property
    def count(self) -> int:
        """Chunks N of a sequence."""
        return self.ids_BNC.shape[1]

    def split(self, x_BTHX: Tensor) -> Tensor:
        """[B, T, H, ...] -> [B, H, N, C, ...], the filling zero."""
        filling = -self.tokens % self.size
        if filling:
            x_BTHX = functional.pad(x_BTHX, [0, 0] * (x_BTHX.ndim - 2) + [0, filling])
        return x_BTHX.unflatten(1, (-1, self.size)).movedim(3, 1)

    def join(self, x_BHNCX: Tensor) -> Tensor:
        """The inverse of split, without the filling."""
        return x_BHNCX.movedim(1, 3).flatten(1, 2)[:, : self.tokens]

    def hidden(self, strictly: bool = False) -> Tensor:
        """bool [B, 1, N, C, C]: key j is after query i, or in another document; `strictly`: nor does a token see itself."""
        C = self.size
        causal_CC = torch.ones(C, C, dtype=torch.bool, device=self.ids_BNC.device).tril(-1 if strictly else 0)
        same_BNCC = self.ids_BNC[..., :, None] == self.ids_BNC[..., None, :]
        return ~(causal_CC & same_BNCC)[:, None]

    def enters(self) -> Tensor:
        """bool [B, 1, N, C]: token i is of the document that the state before its chunk is of.

        The state before the first chunk is of the first document.
        """
        before_BN1 = torch.cat([self.ids_BNC[:, :1, 0], self.ids_BNC[:, :-1, -1]], dim=1)[..., None]
        return (self.ids_BNC == before_BN1)[:, None]

    def leaves(self) -> Tensor:
        """bool [B, 1, N, C]: token j is of the document that the state after its chunk is of."""
        return (self.ids_BNC == self.ids_BNC[..., -1:])[:, None]


def scan_states(keep: Tensor, update_BHNKV: Tensor, initial_BHKV: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before each chunk [B, H, N, K, V] and after the last, of S <- keep S + update.

    keep: [B, H, N, K or 1, V or 1].
    """
    state = torch.zeros_like(update_BHNKV[:, :, 0]) if initial_BHKV is None else initial_BHKV.to(update_BHNKV.dtype)
    before = []
    for keep_n, update_n in zip(keep.unbind(2), update_BHNKV.unbind(2), strict=True):
        before.append(state)
        state = torch.addcmul(update_n, keep_n, state)
    return torch.stack(before, dim=2), state


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in fp32, or fp64 where one of them is: what operations compute in."""
    dtype = torch.float64 if any(x.dtype is torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(dtype) for x in tensors)


def compose(maps_BHNKK: Tensor, new_BHNKV: Tensor, initial_BHKV: Tensor | None) -> Tensor:
    """States before each chunk and after the last, [B, H, N + 1, K, V], of S <- A S + new, where A is a matrix."""
    state = torch.zeros_like(new_BHNKV[:, :, 0]) if initial_BHKV is None else initial_BHKV.to(new_BHNKV.dtype)
    states = [state]
    for number, (map_BHKK, new_BHKV) in enumerate(zip(maps_BHNKK.unbind(2), new_BHNKV.unbind(2), strict=True)):
        is_zero = number == 0 and initial_BHKV is None
        state = new_BHKV if is_zero else new_BHKV + map_BHKK @ state
        states.append(state)
    return torch.stack(states, dim=2)
