"""What a mixer must know of the whole sequence when it sees one contiguous slice of it.

Legend: B sequences, S tokens of the whole sequence, L tokens of this slice, P context parallel ranks, N rows of a halo.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from based_megatron.parallel.sequence.carry import Carry
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.ranks import ONE_RANK, ContextRanks


@dataclass(frozen=True)
class Message:
    """Rows of a halo that one rank owns and another needs: the last `rows` of the owner's slice."""

    owner: int
    reader: int
    rows: int


@dataclass(frozen=True)
class SequencePlan:
    """Made once per micro batch from what every host knows, and passed along with it: never global.

    Slices are contiguous and may be of any lengths, one token included.
    """

    ranks: ContextRanks
    bounds: tuple[int, ...]
    """First position of each slice, and S: P + 1 ascending numbers."""
    documents: Documents | None
    """None if each sequence is one document."""
    device: torch.device
    carry: Carry | None = None
    """What the step before left of each sequence and the next one will need; None if sequences are apart."""
    kept: dict[tuple[str, int], Tensor | None] = field(default_factory=dict)
    """Received states and halos by kind and layer, for layers whose activations are recomputed: they do not ask for them again."""

    @property
    def start(self) -> int:
        """Position of this slice's first token."""
        return self.bounds[self.ranks.rank]

    @property
    def end(self) -> int:
        """Position after this slice's last token."""
        return self.bounds[self.ranks.rank + 1]

    @property
    def length(self) -> int:
        """Tokens L of this slice."""
        return self.end - self.start

    @property
    def is_whole(self) -> bool:
        """Nothing comes from outside of this slice."""
        return self.ranks.size == 1 and self.carry is None

    @property
    def is_last(self) -> bool:
        """The sequences end with this slice."""
        return self.ranks.rank == self.ranks.size - 1

    @cached_property
    def gates(self) -> Tensor:
        """[b, r, p] is 1 where one document covers the end of slice p through the start of slice r, p < r; on the host.

        The state of slice p, of the tokens of its last document, then flows into slice r. B is 1 without documents.
        """
        before_PP = torch.ones(self.ranks.size, self.ranks.size).tril(-1)
        if self.documents is None:
            return before_PP[None]
        bounds = torch.tensor(self.bounds)
        first_BP, last_BP = self.documents.numbers(bounds[:-1]), self.documents.numbers(bounds[1:] - 1)
        return before_PP * (first_BP[:, :, None] == last_BP[:, None, :])

    @cached_property
    def device_gates(self) -> Tensor:
        """The same on the device, fp32."""
        return self.gates.to(self.device, non_blocking=True)

    @property
    def crosses(self) -> bool:
        """Whether any document crosses any boundary: if none does, no rank has anything to tell another."""
        return bool(self.gates.any())

    def opens(self, rank: int) -> Tensor:
        """[b] is 1 where the document of a slice's first token is that of its last; B is 1 without documents. On the host."""
        if self.documents is None:
            return torch.ones(1)
        numbers_B2 = self.documents.numbers(torch.tensor([self.bounds[rank], self.bounds[rank + 1] - 1]))
        return (numbers_B2[:, 0] == numbers_B2[:, 1]).float()

    @cached_property
    def device_opens(self) -> Tensor:
        """The same of this rank's slice, on the device: copied once for all layers, and nobody waits for it."""
        return self.opens(self.ranks.rank).to(self.device, non_blocking=True)

    @cached_property
    def device_continues(self) -> Tensor:
        """[b] is 1 where the sequence goes on with the document that the step before ended in; fp32, on the device."""
        assert self.documents is not None
        continues_B = torch.tensor(self.documents.tokens_before) > 0
        return continues_B.float().to(self.device, non_blocking=True)

    def messages(self, rows: int) -> tuple[Message, ...]:
        """What this rank sends or receives so that every slice has the `rows` before it. Both ends find the same.

        Rows of documents that have ended are not sent. With `carry`, rank 0 also owns the rows before the sequence.
        """
        if rows not in self._messages:
            mine, readers = self.ranks.rank, [self.ranks.rank]
            while readers[-1] + 1 < self.ranks.size and self.bounds[readers[-1] + 1] - rows < self.end:
                readers.append(readers[-1] + 1)
            found = [self._message(mine, reader, rows) for reader in readers[1:]]
            found += [self._message(owner, mine, rows) for owner in range(mine - 1, -1, -1)]
            self._messages[rows] = tuple(message for message in found if message is not None)
        return self._messages[rows]

    @cached_property
    def _messages(self) -> dict[int, tuple[Message, ...]]:
        return {}

    def _message(self, owner: int, reader: int, rows: int) -> Message | None:
        count = self.bounds[owner + 1] - max(self._owned_from(owner, rows), self.bounds[reader] - rows)
        needed = count > 0 and self.gates[:, reader, owner].any()
        return Message(owner, reader, count) if needed else None

    def _owned_from(self, owner: int, rows: int) -> int:
        return self.bounds[owner] - (rows if owner == 0 and self.carry is not None else 0)

    def halo_rows(self, rows: int) -> int:
        """N, the rows that exist in front of this slice and are still of its document, at most `rows`."""
        mine, start = self.ranks.rank, self.start
        begins = [self.bounds[m.owner + 1] - m.rows for m in self.messages(rows) if m.reader == mine]
        if mine == 0 and self.carry is not None:
            begins.append(-rows)
        return start - min(begins, default=start)

    def document_ids(self, halo: int = 0) -> Tensor | None:
        """int32 ids [B, N + L] of this slice and of the N = halo_rows(halo) tokens before it; None without documents.

        -1 where no token exists, before a sequence that continues nothing.
        """
        if self.documents is None:
            return None
        if halo not in self._ids:
            positions = torch.arange(self.start - self.halo_rows(halo), self.end)
            self._ids[halo] = self.documents.numbers(positions).to(self.device, non_blocking=True)
        return self._ids[halo]

    @cached_property
    def _ids(self) -> dict[int, Tensor]:
        return {}


def whole_sequence(documents: Documents | None, length: int, device: torch.device) -> SequencePlan:
    """The plan of sequences that one rank has all of."""
    return SequencePlan(ONE_RANK, (0, length), documents, device)
