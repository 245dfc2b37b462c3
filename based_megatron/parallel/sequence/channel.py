"""The wire between context parallel ranks: three ways to move tensors, each counted, none of them differentiable.

Everything that crosses from one slice of a sequence to another goes through a `Channel`, so that traffic can be counted and
ranks can be threads of one process (sequence/in_process.py) instead of processes.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")
Other = TypeVar("Other")


class Pending(Generic[Value]):
    """Something under way. On a GPU `wait` makes the current stream wait, not the host."""

    def __init__(self, finish: Callable[[], Value]) -> None:
        self._finish: Callable[[], Value] | None = finish
        self._value: list[Value] = []

    @classmethod
    def done(cls, value: Value) -> "Pending[Value]":
        """A value that is there already."""
        return cls(lambda: value)

    def wait(self) -> Value:
        """The value; the same one however often it is asked for."""
        if self._finish is not None:
            self._value.append(self._finish())
            self._finish = None
        return self._value[0]

    def then(self, work: Callable[[Value], Other]) -> "Pending[Other]":
        """The result of `work` on the value, which runs when it is waited for."""
        return Pending(lambda: work(self.wait()))


@dataclass
class Traffic:
    """Calls and bytes of one rank, by kind of exchange (`state`, `halo`, `carried`)."""

    calls: Counter[str] = field(default_factory=Counter)
    sent_bytes: Counter[str] = field(default_factory=Counter)
    received_bytes: Counter[str] = field(default_factory=Counter)

    def count_all_gather(self, kind: str, x: Tensor, size: int) -> None:
        """`x` goes to every other of `size` ranks, and as much comes from each."""
        self._count(kind, x.nbytes * (size - 1), x.nbytes * (size - 1))

    def count_all_to_all(self, kind: str, x: Tensor, size: int) -> None:
        """All parts of `x` but the own one go away, and as many come."""
        moved_bytes = x.nbytes * (size - 1) // size
        self._count(kind, moved_bytes, moved_bytes)

    def count_exchange(
        self, kind: str, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> None:
        """Point to point, as `Channel.exchange` takes it."""
        self._count(kind, sum(x.nbytes for _, x in sends), sum(x.nbytes for _, x in receives))

    def _count(self, kind: str, sent_bytes: int, received_bytes: int) -> None:
        self.calls[kind] += 1
        self.sent_bytes[kind] += sent_bytes
        self.received_bytes[kind] += received_bytes

    def clear(self) -> None:
        """Count from zero."""
        for counter in (self.calls, self.sent_bytes, self.received_bytes):
            counter.clear()


class Channel(Protocol):
    """Ranks 0 .. size - 1 that call the same methods in the same order. Sizes and dtypes agree on both ends."""

    rank: int
    size: int

    def all_gather(self, kind: str, x: Tensor) -> Pending[Tensor]:
        """[P, *x.shape], the tensors of all ranks; x has at least one dim."""

    def all_to_all(self, kind: str, x: Tensor) -> Tensor:
        """Part p of dim 0 (of size P) goes to rank p. Returns what came from each rank, laid out alike."""

    def exchange(
        self, kind: str, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Pending[None]:
        """Point to point: contiguous tensors for some ranks, and buffers that tensors of others are written to."""


@dataclass
class GroupChannel:
    """A channel over a process group: NCCL on GPUs, gloo on CPUs."""

    group: dist.ProcessGroup
    traffic: Traffic

    def __post_init__(self) -> None:
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._global_ranks = dist.get_process_group_ranks(self.group)

    def all_gather(self, kind: str, x: Tensor) -> Pending[Tensor]:
        x = x.contiguous()
        self.traffic.count_all_gather(kind, x, self.size)
        gathered = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        work = dist.all_gather_into_tensor(gathered.flatten(0, 1), x, group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return gathered

        return Pending(finish)

    def all_to_all(self, kind: str, x: Tensor) -> Tensor:
        x = x.contiguous()
        self.traffic.count_all_to_all(kind, x, self.size)
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=self.group)
        return received

    def exchange(
        self, kind: str, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Pending[None]:
        if not sends and not receives:
            return Pending.done(None)
        self.traffic.count_exchange(kind, sends, receives)
        operations = [dist.P2POp(dist.isend, x, self._global_ranks[peer], self.group) for peer, x in sends]
        operations += [dist.P2POp(dist.irecv, x, self._global_ranks[peer], self.group) for peer, x in receives]
        works = dist.batch_isend_irecv(operations)

        def finish() -> None:
            for work in works:
                work.wait()
            operations.clear()

        return Pending(finish)
