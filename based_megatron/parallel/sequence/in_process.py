"""Context parallel ranks as threads of one process: for gradcheck, and to check all ranks' programs on one GPU.

Each rank's program runs in a thread of its own and waits where it needs another's tensor.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from based_megatron.parallel.sequence.channel import Pending, Traffic
from based_megatron.parallel.sequence.ranks import Algorithm, ContextRanks, split_into_nodes

Result = TypeVar("Result")
TIMEOUT_SECONDS = 60.0


class Mailbox:
    """Messages between the ranks of one channel. As over NCCL, the n-th receive of a pair gets the n-th send of the pair."""

    def __init__(self) -> None:
        self._messages: dict[tuple[int, int, int], Tensor] = {}
        self._sent: Counter[tuple[int, int]] = Counter()
        self._expected: Counter[tuple[int, int]] = Counter()
        self._changed = threading.Condition()

    def put(self, source: int, target: int, x: Tensor) -> None:
        """Send a copy of `x`."""
        with self._changed:
            self._messages[source, target, self._sent[source, target]] = x.detach().clone()
            self._sent[source, target] += 1
            self._changed.notify_all()

    def expect(self, source: int, target: int) -> Pending[Tensor]:
        """Post a receive. Waiting for it raises TimeoutError if the message does not come."""
        with self._changed:
            number = self._expected[source, target]
            self._expected[source, target] += 1
        return Pending(lambda: self._take((source, target, number)))

    def _take(self, key: tuple[int, int, int]) -> Tensor:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._messages, TIMEOUT_SECONDS):
                raise TimeoutError(f"rank {key[1]} had no message of rank {key[0]} in {TIMEOUT_SECONDS:.0f} s")
            return self._messages.pop(key)


@dataclass
class InProcessChannel:
    """A channel whose ranks are threads."""

    mailbox: Mailbox
    rank: int
    size: int
    traffic: Traffic

    def all_gather(self, kind: str, x: Tensor) -> Pending[Tensor]:
        self.traffic.count_all_gather(kind, x, self.size)
        return self._swap([x] * self.size)

    def all_to_all(self, kind: str, x: Tensor) -> Tensor:
        self.traffic.count_all_to_all(kind, x, self.size)
        return self._swap(list(x.unbind(0))).wait()

    def exchange(
        self, kind: str, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Pending[None]:
        if not sends and not receives:
            return Pending.done(None)
        self.traffic.count_exchange(kind, sends, receives)
        for peer, x in sends:
            self.mailbox.put(self.rank, peer, x)
        arriving = [(self.mailbox.expect(peer, self.rank), buffer) for peer, buffer in receives]

        def finish() -> None:
            for message, buffer in arriving:
                buffer.copy_(message.wait())

        return Pending(finish)

    def _swap(self, parts: list[Tensor]) -> Pending[Tensor]:
        """Part p goes to rank p; what comes from each rank, stacked."""
        for peer, x in enumerate(parts):
            self.mailbox.put(self.rank, peer, x)
        arriving = [self.mailbox.expect(peer, self.rank) for peer in range(self.size)]
        return Pending(lambda: torch.stack([message.wait() for message in arriving]))


def run_ranks(size: int, program: Callable[[int], Result]) -> list[Result]:
    """Run program(rank) for every rank, each in a thread of its own; the results in rank order.

    Raises the first rank's error; the others then run into their time limit, or end.
    """
    with ThreadPoolExecutor(size, "rank") as pool:
        futures = [pool.submit(program, rank) for rank in range(size)]
        return [future.result() for future in futures]


def in_process_ranks(size: int, algorithm: Algorithm = "auto", node_ranks: int = 0) -> list[ContextRanks]:
    """The places of all ranks; give each to the program of its thread. node_ranks as in `build_context_ranks`."""
    nodes = split_into_nodes(range(size), node_ranks)
    states, halos = Mailbox(), Mailbox()
    node_boxes, rail_boxes = [Mailbox() for _ in nodes], [Mailbox() for _ in range(node_ranks)]
    ranks = []
    for rank in range(size):
        traffic = Traffic()
        node = rail = None
        if nodes:
            number, place = divmod(rank, node_ranks)
            node = InProcessChannel(node_boxes[number], place, node_ranks, traffic)
            if len(nodes) > 1:
                rail = InProcessChannel(rail_boxes[place], number, len(nodes), traffic)
        ranks.append(
            ContextRanks(
                rank,
                size,
                InProcessChannel(states, rank, size, traffic),
                InProcessChannel(halos, rank, size, traffic),
                node,
                rail,
                algorithm,
                traffic,
            )
        )
    return ranks
