"""Tensor parallel ranks whose GPUs write into each other's memory: products write there, and copy engines carry rows.

NCCL's kernels need multiprocessors, which a matrix product leaves to nobody before it ends: the two do not run side by side. Here a
product of another rank's rows is stored into that rank's memory by the product itself, and rows that others need are copied without
a kernel.

Legend: P ranks, T rows of a rank; X input and O output features of a product.
"""

import math
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.config import ParallelConfig
from based_megatron.errors import ConfigError
from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.tensor_overlap import CollectiveRanks, TensorRanks, multiply, places_of_others


class SharedBuffer(Protocol):
    """A buffer of each rank that all ranks can write to, such as PyTorch's symmetric memory."""

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The beginning of a rank's buffer, as a tensor."""

    def barrier(self) -> None:
        """The stream waits for those of all ranks: what they wrote before is there."""


class MemoryRanks:
    """Ranks that write into inboxes of each other.

    Each has two inboxes, for exchanges in turn, and an exchange has one barrier, between writing and reading. That is enough: an inbox
    is written again after the barrier of the exchange between, which no rank passes before all have begun that exchange, on the stream of
    the products, and so have read what the one before it brought.
    """

    def __init__(self, rank: int, size: int, device: torch.device, allocate: Callable[[int], SharedBuffer]) -> None:
        """allocate: a buffer of so many bytes; all ranks call it for the same ones."""
        self.rank, self.size, self._allocate = rank, size, allocate
        self._inboxes: list[SharedBuffer] = []
        self._inbox_bytes = self._exchanges = 0
        self._copies = _SideStream(device)

    def gathering(self, x_TX: Tensor, rows_PTX: Tensor) -> Iterator[tuple[slice, Tensor]]:
        inbox, places = self._next_inbox(rows_PTX.shape, rows_PTX.dtype), places_of_others(self.rank, self.size)
        with self._copies.aside():
            for other in self._others():
                inbox.get_buffer(other, rows_PTX.shape, rows_PTX.dtype)[self.rank].copy_(x_TX)
            rows_PTX[self.rank].copy_(x_TX)
            inbox.barrier()
            arrived_PTX = inbox.get_buffer(self.rank, rows_PTX.shape, rows_PTX.dtype)
            for others in places:
                rows_PTX[others].copy_(arrived_PTX[others])
        yield slice(self.rank, self.rank + 1), x_TX[None]
        self._copies.join()
        for others in places:
            yield others, rows_PTX[others]

    def product_sum(self, x_PTX: Tensor, weight_XO: Tensor, bias_O: Tensor | None = None) -> Pending[Tensor]:
        shape, dtype = (self.size, x_PTX.shape[1], weight_XO.shape[1]), x_PTX.dtype
        inbox = self._next_inbox(shape, dtype)
        for other in self._others():
            torch.mm(x_PTX[other], weight_XO, out=inbox.get_buffer(other, shape, dtype)[self.rank])
        sum_TO = x_PTX.new_empty(shape[1:])
        multiply(x_PTX[self.rank], weight_XO, bias_O, out=sum_TO)

        def finish() -> Tensor:
            inbox.barrier()
            arrived_PTO = inbox.get_buffer(self.rank, shape, dtype)
            for other in self._others():
                sum_TO.add_(arrived_PTO[other])
            return sum_TO

        return Pending(finish)

    def _others(self) -> list[int]:
        """The other ranks, beginning with the next, so that no two write to the same one at a time."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def _next_inbox(self, shape: tuple[int, ...], dtype: torch.dtype) -> SharedBuffer:
        """The inbox of the next exchange, of a tensor of this shape."""
        needed_bytes = math.prod(shape) * dtype.itemsize
        if needed_bytes > self._inbox_bytes:
            self._copies.finish_all()  # memory of the old inboxes may become that of new ones
            self._inboxes, self._inbox_bytes = [self._allocate(needed_bytes) for _ in range(2)], needed_bytes
        self._exchanges += 1
        return self._inboxes[self._exchanges % 2]


class _SideStream:
    """Work that runs at the same time as that of the current stream; on a CPU, work that is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def aside(self) -> AbstractContextManager[object]:
        """What is launched in this block waits for what the current stream has so far, and runs at the same time as what comes then."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def join(self) -> None:
        """The current stream waits for that work."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def finish_all(self) -> None:
        """The host waits for all streams."""
        if self._stream is not None:
            torch.cuda.synchronize(self._stream.device)


def overlapping_ranks(parallel: ParallelConfig, group: dist.ProcessGroup, device: torch.device) -> TensorRanks | None:
    """The ways of rows between tensor parallel ranks that a layout asks for; None: no overlap. All ranks call it.

    Raises ConfigError if they cannot write into each other's memory and the layout insists on it.
    """
    if group.size() == 1 or not parallel.sequence_parallel or parallel.overlap_tensor == "off":
        return None
    if parallel.overlap_tensor != "memory":
        return CollectiveRanks(group)
    if not _are_neighbours(group, device):
        raise ConfigError(
            f"parallel.overlap_tensor is memory, but {group.size()} tensor parallel ranks do not all reach each other's GPU memory "
            f"(one host, peer access); set parallel.overlap_tensor=collectives"
        )
    return memory_ranks(group, device)


def memory_ranks(group: dist.ProcessGroup, device: torch.device) -> MemoryRanks:
    """Ranks of one host that write into each other's GPU memory."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    def allocate(size_bytes: int) -> SharedBuffer:
        buffer = symmetric_memory.empty(size_bytes, dtype=torch.uint8, device=device)
        return symmetric_memory.rendezvous(buffer, group)

    return MemoryRanks(group.rank(), group.size(), device, allocate)


def _are_neighbours(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether all ranks are on one host, on GPUs that reach each other's memory."""
    if device.type != "cuda":
        return False
    places: list[tuple[str, int]] = [("", 0)] * group.size()
    dist.all_gather_object(places, (socket.gethostname(), device.index), group=group)
    hosts, devices = {host for host, _ in places}, {index for _, index in places}
    if len(hosts) > 1 or len(devices) < group.size():
        return False
    return all(torch.cuda.can_device_access_peer(device, other) for other in devices - {device.index})
