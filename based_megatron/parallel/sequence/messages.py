"""Messages between the slices of a sequence, and their delivery between the ranks that hold the slices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.sequence.ranks import ContextRanks


@dataclass(frozen=True)
class Message:
    """Rows at the positions first <= p < last, which one slice has and a later one reads.

    Slices have the numbers of their ranks, 0 .. P - 1. Number -1 is the slice of the step before, whose positions are negative, and
    number P that of the next step.
    """

    owner: int
    reader: int
    first: int
    last: int

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.last - self.first

    def within(self, start: int) -> slice:
        """The place of its rows in a tensor [B, rows, ...] whose first row is at position `start`."""
        return slice(self.first - start, self.last - start)


Arrived = list[tuple[Message, Tensor]]
"""Messages for this rank, with their content."""


@dataclass(frozen=True)
class Parcel:
    """A message with the ranks it goes from and to: from the owner's to the reader's, or back, as a gradient."""

    source: int
    target: int
    message: Message


def deliver(
    ranks: ContextRanks,
    kind: str,
    parcels: Sequence[Parcel],
    content: Callable[[Message], Tensor],
    buffer: Callable[[Message], Tensor],
) -> Pending[Arrived]:
    """Begin to send and to receive parcels; gives those for this rank, in order. What stays on a rank is not sent.

    parcels: those that this rank sends or receives, in the same order on both ends. content: what a message from here has.
    buffer: an empty tensor for a message from elsewhere.
    """
    sends: list[tuple[int, Tensor]] = []
    receives: list[tuple[int, Tensor]] = []
    arriving: Arrived = []
    for parcel in parcels:
        if parcel.source == parcel.target:
            arriving.append((parcel.message, content(parcel.message)))
        elif parcel.source == ranks.rank:
            sends.append((parcel.target, content(parcel.message).contiguous()))
        else:
            received = buffer(parcel.message)
            receives.append((parcel.source, received))
            arriving.append((parcel.message, received))
    if ranks.halos is None:
        return Pending.done(arriving)
    return ranks.halos.exchange(kind, sends, receives).then(lambda _: arriving)


def sum_of_rows(arrived: Arrived, first: int, last: int, like: Tensor) -> Tensor:
    """Rows [B, last - first, ...] at the positions first <= p < last: the sum of what arrived for each, or zeros."""
    total = like.new_zeros(like.shape[0], last - first, *like.shape[2:])
    for message, rows in arrived:
        total[:, message.within(first)] += rows
    return total
