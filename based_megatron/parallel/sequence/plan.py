"""The plan of a sequence: what a mixer must know of the whole when it sees one contiguous slice of it.

Legend: B sequences, S tokens of the whole sequence, L tokens of this slice, P context parallel ranks, N rows of a halo.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from based_megatron.parallel.sequence.carried import STEP_BEFORE, CarriedState, NothingCarried
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.messages import Message, Parcel
from based_megatron.parallel.sequence.ranks import ONE_RANK, ContextRanks
from based_megatron.parallel.transfer import to_device


@dataclass(frozen=True)
class SequencePlan:
    """The slices of the sequences of one micro batch and what flows between them, known on every host before anything is sent.

    Slices are contiguous and may be of any lengths, one token included. Those of the ranks are numbered 0 .. P - 1. Where states
    are carried from step to step, -1 is the slice of the step before and P that of the next; the first rank holds both.
    """

    ranks: ContextRanks
    bounds: tuple[int, ...]
    """First position of each slice, and S: P + 1 ascending numbers."""
    documents: Documents | None
    """Starts of documents; None if each sequence is one document."""
    device: torch.device
    carried: CarriedState = field(default_factory=NothingCarried)
    """What the step before left for this one, and what this one leaves for the next."""
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
    def slices(self) -> range:
        """Numbers of all slices that rows and states flow between."""
        return self.carried.slices(self.ranks.size)

    def holder(self, number: int) -> int:
        """Rank that holds a slice."""
        return number if 0 <= number < self.ranks.size else 0

    def holds(self, number: int) -> bool:
        """Whether this rank holds a slice."""
        return self.holder(number) == self.ranks.rank

    @property
    def is_whole(self) -> bool:
        """Whether this slice is all there is: nothing comes into it from outside, and nothing leaves it."""
        return len(self.slices) == 1

    @property
    def is_last(self) -> bool:
        """The sequences end with this slice."""
        return self.ranks.rank == self.ranks.size - 1

    @cached_property
    def gates(self) -> Tensor:
        """Entry [b, r, p] is 1 where one document covers the end of slice p through the start of slice r, p < r; on the host.

        The state of slice p, of the tokens of its last document, then flows into slice r. r and p are places in `slices`. The
        next step counts as one that goes on with the last document. B is 1 without documents.
        """
        earlier = torch.ones(len(self.slices), len(self.slices)).tril(-1)
        if self.documents is None:
            return earlier[None]
        # Slice -1 reads nothing and slice P is read by none: where -1 starts and P ends is not needed, any position will do.
        first = torch.tensor([self.bounds[max(number, 0)] for number in self.slices])
        last = torch.tensor([self.bounds[min(number + 1, self.ranks.size)] - 1 for number in self.slices])
        first_Br, last_Bp = self.documents.numbers(first), self.documents.numbers(last)
        return earlier * (first_Br[:, :, None] == last_Bp[:, None, :])

    @cached_property
    def device_gates(self) -> Tensor:
        """`gates` on the device, fp32: copied once for all layers, and nobody waits for it."""
        return to_device(self.gates, self.device)

    @cached_property
    def rank_gates(self) -> Tensor:
        """The gates [B, P, P] between slices of ranks, on the host."""
        return self._of_ranks(self.gates)

    @cached_property
    def device_rank_gates(self) -> Tensor:
        """`rank_gates` on the device, fp32."""
        return self._of_ranks(self.device_gates).contiguous()

    @cached_property
    def _device_flows(self) -> Tensor:
        return self.device_gates > 0

    def flows(self, owner: int, reader: int) -> Tensor:
        """Sequences in which the state of one slice flows into a later one: bool [B], on the device."""
        return self._device_flows[:, self.slices.index(reader), self.slices.index(owner)]

    def flows_anywhere(self, owner: int, reader: int) -> bool:
        """Whether the state of one slice flows into a later one in any sequence; the host knows."""
        return bool(self.gates[:, self.slices.index(reader), self.slices.index(owner)].any())

    @cached_property
    def crosses(self) -> bool:
        """Whether any document crosses a boundary between ranks: if none does, no rank has a state for another."""
        return bool(self.rank_gates.any())

    def messages(self, rows: int) -> tuple[Message, ...]:
        """Messages from or to slices of this rank that bring every slice the `rows` before it, by reader, then by owner.

        Both ends find the same ones. Rows of documents that have ended are in none. Messages between two slices of one rank are
        among them, though nothing is sent.
        """
        if rows not in self._messages:
            held = [number for number in self.slices if self.holds(number)]
            pairs = {(min(own, other), max(own, other)) for own in held for other in self.slices if other != own}
            found = [self._message(*pair, rows) for pair in sorted(pairs, key=lambda pair: pair[::-1])]
            self._messages[rows] = tuple(message for message in found if message is not None)
        return self._messages[rows]

    @cached_property
    def _messages(self) -> dict[int, tuple[Message, ...]]:
        return {}

    def _message(self, owner: int, reader: int, rows: int) -> Message | None:
        wanted = self.bounds[reader] - rows
        first, last = wanted if owner == STEP_BEFORE else max(self.bounds[owner], wanted), self.bounds[owner + 1]
        if first >= last:
            return None
        # Rows of slice -1 go where those of slice 0 go: the length of a halo, and so the order in which kernels add its rows up,
        # does not depend on whether any document goes on from the step before.
        source = self.holder(owner)
        needed = source == self.holder(reader) or self.flows_anywhere(source, reader)
        return Message(owner, reader, first, last) if needed else None

    def halo_messages(self, rows: int) -> tuple[Message, ...]:
        """Those of `messages` that slices of this step read."""
        return tuple(m for m in self.messages(rows) if m.reader < self.ranks.size)

    def carried_messages(self, rows: int) -> tuple[Message, ...]:
        """Those of `messages` that the next step reads."""
        return tuple(m for m in self.messages(rows) if m.reader == self.ranks.size)

    def parcel(self, message: Message) -> Parcel:
        """A message with the ranks that hold its owner and its reader."""
        return Parcel(self.holder(message.owner), self.holder(message.reader), message)

    def halo_rows(self, rows: int) -> int:
        """N, the rows that exist in front of this slice and are still of its document, at most `rows`."""
        begins = [m.first for m in self.messages(rows) if m.reader == self.ranks.rank]
        return self.start - min(begins, default=self.start)

    def _of_ranks(self, gates: Tensor) -> Tensor:
        first = self.slices.index(0)
        ranks = slice(first, first + self.ranks.size)
        return gates[:, ranks, ranks]

    def document_ids(self, halo: int = 0) -> Tensor | None:
        """int32 ids [B, N + L] of this slice and of the N = halo_rows(halo) tokens before it; None without documents.

        -1 where no token exists, before a sequence that continues nothing.
        """
        if self.documents is None:
            return None
        if halo not in self._ids:
            positions = torch.arange(self.start - self.halo_rows(halo), self.end)
            self._ids[halo] = to_device(self.documents.numbers(positions), self.device)
        return self._ids[halo]

    @cached_property
    def _ids(self) -> dict[int, Tensor]:
        return {}


def whole_sequence(documents: Documents | None, length: int, device: torch.device) -> SequencePlan:
    """The plan of sequences that one rank has all of."""
    return SequencePlan(ONE_RANK, (0, length), documents, device)
