"""A sequence cut into chunks that are worked on side by side, and the state that goes from chunk to chunk.

Legend: B batch, T tokens, G chunks, C tokens of a chunk, H heads, F feature dim, V value head dim, X any last dimension.

A linear recurrence takes the state before a chunk to the state after it by an affine map, S' = A S + N. The maps of all chunks are
made at once; only their composition is a loop, with one product a chunk. Tokens that fill up the last chunk are zeros of the last
token's document: what is multiplied by them vanishes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Chunks:
    """The chunks of a batch of sequences, and which of their tokens see each other and the states around them.

    Ids do not decrease; those of one row may serve the whole batch. The state before the first chunk is of its first token's document.
    """

    tokens: int
    size: int
    """C, tokens of a chunk."""
    document_ids_BT: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.document_ids_BT is None or self.document_ids_BT.shape[1] == self.tokens, self

    @property
    def count(self) -> int:
        """G, the number of chunks."""
        return -(-self.tokens // self.size)

    def cut(self, x_BTHX: Tensor, dtype: torch.dtype) -> Tensor:
        """The chunks of all heads, [G, B, H, C, X]."""
        x_BTHX = functional.pad(x_BTHX, (0, 0, 0, 0, 0, self.count * self.size - self.tokens))
        return x_BTHX.to(dtype).unflatten(1, (self.count, self.size)).permute(1, 0, 3, 2, 4)

    def joined(self, x_GBHCX: Tensor, dtype: torch.dtype) -> Tensor:
        """The sequence again, [B, T, H, X]."""
        return x_GBHCX.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : self.tokens].to(dtype)

    @cached_property
    def _ids_GBC(self) -> Tensor | None:
        if self.document_ids_BT is None:
            return None
        missing = self.count * self.size - self.tokens
        last_B1 = self.document_ids_BT[:, -1:].expand(-1, missing)
        return torch.cat([self.document_ids_BT, last_B1], dim=1).unflatten(1, (self.count, self.size)).transpose(0, 1)

    @cached_property
    def _ids_before_GB1(self) -> Tensor | None:
        ids = self._ids_GBC
        return None if ids is None else torch.cat([ids[:1, :, :1], ids[:-1, :, -1:]])

    def visible(self, device: torch.device) -> Tensor:
        """bool, [C, C] or with documents [G, B, 1, C, C]: key j is at or before query i, and in its document."""
        causal = torch.ones(self.size, self.size, dtype=torch.bool, device=device).tril()
        ids = self._ids_GBC
        return causal if ids is None else (causal & (ids[..., :, None] == ids[..., None, :]))[:, :, None]

    @property
    def reads(self) -> Tensor | None:
        """bool [G, B, 1, C, 1]: the token is of the document of the state before its chunk. None where all are."""
        ids = self._ids_GBC
        return None if ids is None else (ids == self._ids_before_GB1)[:, :, None, :, None]

    @property
    def writes(self) -> Tensor | None:
        """bool [G, B, 1, C, 1]: the token is of the document of the state after its chunk. None where all are."""
        ids = self._ids_GBC
        return None if ids is None else (ids == ids[..., -1:])[:, :, None, :, None]

    @property
    def keeps(self) -> Tensor | None:
        """bool [G, B, 1, 1, 1]: the document of the state before the chunk is open at its end. None where all are."""
        ids = self._ids_GBC
        return None if ids is None else (ids[..., -1:] == self._ids_before_GB1)[:, :, None, :, None]


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with zeros where the mask is False; a mask of None is all True."""
    return x if mask is None else x * mask


def decay(log_decay: Tensor, mask: Tensor | None) -> Tensor:
    """exp(log_decay), and 0 where the mask is False, whose log decays may be of any size."""
    return (log_decay if mask is None else log_decay.masked_fill(~mask, -torch.inf)).exp()


def states_between(
    maps_GBHFF: Tensor, new_GBHFV: Tensor, initial_state_BHFV: Tensor | None
) -> Tensor:
    """The state before each of G chunks and after the last, [G + 1, B, H, F, V], where S' = A S + N; None is a state of zeros."""
    state = torch.zeros_like(new_GBHFV[0]) if initial_state_BHFV is None else initial_state_BHFV
    states = [state]
    for number, (map_BHFF, new_BHFV) in enumerate(zip(maps_GBHFF, new_GBHFV, strict=True)):
        is_zero = number == 0 and initial_state_BHFV is None
        state = new_BHFV if is_zero else new_BHFV + map_BHFF @ state
        states.append(state)
    return torch.stack(states)
