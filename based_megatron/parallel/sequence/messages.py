"""Rows and states that slices owe each other, brought to the ranks that hold the slices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.sequence.ranks import ContextRanks


@dataclass(frozen=True)
class Message:
    """Rows at the positions first <= p < last, which one slice has and a later one reads.

    Slices are numbered as their ranks. Number -1 is that of the step before, whose positions are negative; P is that of the next.
    """

    owner: int
    reader: int
    first: int
    last: int

    @property
    def rows(self) -> int:
        return self.last - self.first

    def within(self, start: int) -> slice:
        """Where its rows are in a tensor [B, rows, ...] whose first row is at position `start`."""
        return slice(self.first - start, self.last - start)


@dataclass(frozen=True)
class Parcel:
    """A message on its way from the rank that has the tensor to the one that needs it: back, if it is a gradient."""

    source: int
    target: int
    message: Message


def deliver(
    ranks: ContextRanks,
    kind: str,
    parcels: Sequence[Parcel],
    content: Callable[[Message], Tensor],
    buffer: Callable[[Message], Tensor],
) -> Pending[list[tuple[Message, Tensor]]]:
    """Begin to send and to receive parcels; gives those for this rank, in order. What stays on a rank is not sent.

    parcels: those that this rank sends or receives, in the same order on both ends. content: what a message from here has.
    buffer: an empty tensor for a message from elsewhere.
    """
    mine, sends, receives, arriving = ranks.rank, [], [], []
    for parcel in parcels:
        if parcel.source == parcel.target:
            arriving.append((parcel.message, content(parcel.message)))
        elif parcel.source == mine:
            sends.append((parcel.target, content(parcel.message).contiguous()))
        else:
            received = buffer(parcel.message)
            receives.append((parcel.source, received))
            arriving.append((parcel.message, received))
    if ranks.halos is None:
        return Pending.done(arriving)
    return ranks.halos.exchange(kind, sends, receives).then(lambda _: arriving)
