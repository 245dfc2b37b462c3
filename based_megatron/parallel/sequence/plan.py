"""What a mixer must know of the whole sequence when it sees one contiguous slice of it.

Legend: B sequences, S tokens of the whole sequence, L tokens of this slice, P context parallel ranks, N rows of a halo.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from based_megatron.parallel.topology import Axis


@dataclass(frozen=True)
class SequencePlan:
    """Made once per micro batch, from document ids that every rank knows; passed along with it, never global."""

    axis: Axis
    """Context parallel group, rank and size."""
    length: int
    """Tokens L of every slice."""
    document_ids_BS: Tensor | None
    """int32 ids of the whole sequence, on the device; None if it is one document."""
    gates_BPP: Tensor | None
    """gates[b, r, p] is 1 where the state of slice p flows into slice r, for the exclusive prefix; None with one rank."""

    @classmethod
    def build(cls, document_ids_BS: Tensor | None, length: int, axis: Axis, device: torch.device) -> "SequencePlan":
        """Plan for slices of `length` tokens. document_ids_BS is int32 on the host, or None."""
        gates = None
        if axis.size > 1:
            gates = _prefix_gates(document_ids_BS, length, axis.size).to(device, non_blocking=True)
        ids = None if document_ids_BS is None else document_ids_BS.to(device, non_blocking=True)
        return cls(axis, length, ids, gates)

    @property
    def start(self) -> int:
        """Position of this slice's first token."""
        return self.axis.rank * self.length

    def halo_rows(self, wanted: int) -> int:
        """Rows that exist in front of this slice, at most `wanted`."""
        return min(wanted, self.start)

    def document_ids(self, halo: int = 0) -> Tensor | None:
        """int32 ids [B, N + L] of this slice and of the N = halo_rows(halo) tokens in front of it; None if one document."""
        if self.document_ids_BS is None:
            return None
        return self.document_ids_BS[:, self.start - self.halo_rows(halo) : self.start + self.length]


def _prefix_gates(document_ids_BS: Tensor | None, length: int, size: int) -> Tensor:
    """1 where one document covers the end of slice p through the start of slice r (p < r): its state then flows from p to r."""
    before = torch.ones(size, size, dtype=torch.float32).tril(-1)
    if document_ids_BS is None:
        return before[None]
    last_BP = document_ids_BS[:, length - 1 :: length]
    first_BP = document_ids_BS[:, ::length]
    return before * (first_BP[:, :, None] == last_BP[:, None, :])
