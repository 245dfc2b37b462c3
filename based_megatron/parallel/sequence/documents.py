"""The documents of packed sequences, known on the host of every rank.

Legend: B sequences, S tokens of the whole sequence, n positions asked about.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Starts of the documents of each sequence: a few numbers, however long the sequence is."""

    starts: tuple[Tensor, ...]
    """For each sequence, int64 positions on the host at which documents begin, ascending from 0."""
    tokens_before: tuple[int, ...] = ()
    """For each sequence, the tokens of its first document that are in the sequences of earlier steps. Empty: none."""

    @classmethod
    def from_ids(cls, ids_BS: Tensor) -> "Documents":
        """From ids that change where documents begin."""
        ids_BS = ids_BS.cpu()
        changes_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        changes_BS[:, 1:] = ids_BS[:, 1:] != ids_BS[:, :-1]
        return cls(tuple(changes_S.nonzero().flatten() for changes_S in changes_BS))

    def numbers(self, positions_n: Tensor) -> Tensor:
        """int32 [B, n] numbers, from 0, of the documents at these positions.

        Before the sequence, 0 for tokens of a document that goes on in it, and -1 for none.
        """
        rows = [torch.searchsorted(starts, positions_n, right=True) - 1 for starts in self.starts]
        numbers_Bn = torch.stack(rows).to(torch.int32)
        if any(self.tokens_before):
            begins_B1 = -torch.tensor(self.tokens_before)[:, None]
            numbers_Bn = torch.where((positions_n < 0) & (positions_n >= begins_B1), 0, numbers_Bn)
        return numbers_Bn

    def with_past(self, known: Callable[[int], int]) -> "Documents":
        """These documents where, of so many tokens before each sequence, only `known` many are."""
        return Documents(self.starts, tuple(map(known, self.tokens_before)))
