"""Context parallel ranks as threads of one process: for gradcheck, and to check all ranks' programs on one GPU.

Each rank's program runs in a thread of its own and waits where it needs another's tensor.
"""

import threading
from collections import defaultdict, deque
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
    """Messages between the ranks of one channel, in order for each pair."""

    def __init__(self) -> None:
        self._messages: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)
        self._changed = threading.Condition()

    def put(self, source: int, target: int, x: Tensor) -> None:
        with self._changed:
            self._messages[source, target].append(x)
            self._changed.notify_all()

    def take(self, source: int, target: int) -> Tensor:
        """The next message of a pair. Raises TimeoutError if it does not come."""
        with self._changed:
            box = self._messages[source, target]
            if not self._changed.wait_for(lambda: box, TIMEOUT_SECONDS):
                raise TimeoutError(f"rank {target} had no message of rank {source} in {TIMEOUT_SECONDS:.0f} s")
            return box.popleft()


@dataclass
class InProcessChannel:
    """A channel whose ranks are threads."""

    mailbox: Mailbox
    rank: int
    size: int
    traffic: Traffic

    def all_gather(self, kind: str, x: Tensor) -> Pending[Tensor]:
        self.traffic.count_all_gather(kind, x, self.size)
        self._put([x] * self.size)
        return Pending(lambda: torch.stack(self._take()))

    def all_to_all(self, kind: str, x: Tensor) -> Tensor:
        self.traffic.count_all_to_all(kind, x, self.size)
        self._put(list(x.unbind(0)))
        return torch.stack(self._take())

    def exchange(
        self, kind: str, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Pending[None]:
        if not sends and not receives:
            return Pending.done(None)
        self.traffic.count_exchange(kind, sends, receives)
        for peer, x in sends:
            self.mailbox.put(self.rank, peer, x.detach().clone())

        def finish() -> None:
            for peer, buffer in receives:
                buffer.copy_(self.mailbox.take(peer, self.rank))

        return Pending(finish)

    def _put(self, parts: list[Tensor]) -> None:
        for peer, x in enumerate(parts):
            self.mailbox.put(self.rank, peer, x.detach().clone())

    def _take(self) -> list[Tensor]:
        return [self.mailbox.take(peer, self.rank) for peer in range(self.size)]


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
