"""A rank among others that do not exist: their messages are random numbers, there as soon as they are waited for.

So the computation for an exchange, and the computation that hides it, can be timed on one device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.sequence.ranks import Algorithm, ContextRanks


@dataclass
class AbsentChannel:
    """A channel (sequence/channel.py) that moves nothing and records when an exchange starts and when it is waited for."""

    rank: int
    size: int
    covers: list[tuple[Any, Any]] = field(default_factory=list)
    """Times (`now`) of the start of each exchange and of the wait for it."""
    _buffers: dict[Any, Tensor] = field(default_factory=dict)

    def all_gather(self, kind: str, x: Tensor) -> Pending[Tensor]:
        return self._pending(x, self._buffer((self.size, *x.shape), x))

    def all_to_all(self, kind: str, x: Tensor) -> Tensor:
        return self._buffer(x.shape, x)

    def exchange(
        self, kind: str, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Pending[None]:
        for _, buffer in receives:
            buffer.zero_()
        if not sends and not receives:
            return Pending.done(None)
        return self._pending((sends or receives)[0][1], None)

    def _pending(self, like: Tensor, value: Any) -> Pending[Any]:
        start = now(like.device)

        def finish() -> Any:
            self.covers.append((start, now(like.device)))
            return value

        return Pending(finish)

    def _buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Random numbers, since products with zeros are faster; positive, as the normaliser's moments are."""
        key = (tuple(shape), like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = torch.rand(*shape, dtype=like.dtype, device=like.device)
        return self._buffers[key]


def now(device: torch.device) -> Any:
    """The present time on the device's stream; `milliseconds` is the difference of two."""
    if device.type != "cuda":
        return time.perf_counter()
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: Any, end: Any) -> float:
    """Milliseconds between two times that have passed."""
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def among_absent_ranks(rank: int, size: int, algorithm: Algorithm, node_ranks: int = 8) -> ContextRanks:
    """One rank's view of the group; nodes as `two_level` needs them."""
    node = rail = None
    if algorithm == "two_level":
        number, place = divmod(rank, node_ranks)
        node = AbsentChannel(place, node_ranks)
        rail = AbsentChannel(number, size // node_ranks) if size > node_ranks else None
    return ContextRanks(rank, size, AbsentChannel(rank, size), AbsentChannel(rank, size), node, rail, algorithm)


def plan_among_absent_ranks(ranks: ContextRanks, tokens: int, device: torch.device) -> SequencePlan:
    """A plan of slices with `tokens` tokens each, one document over all of them."""
    return SequencePlan(ranks, tuple(tokens * i for i in range(ranks.size + 1)), None, device)
