"""A rank's place among others that are not there: their messages are random, and come when they are waited for.

What a rank computes for an exchange, and what it computes while it waits, can so be timed on one device.
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
    """A channel (sequence/channel.py) that moves nothing and notes when it is asked and when it is waited for."""

    rank: int
    size: int
    covers: list[tuple[Any, Any]] = field(default_factory=list)
    """Of each exchange, moments (`moment`) of its start and of the wait for it."""
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
        start = moment(like.device)

        def finish() -> Any:
            self.covers.append((start, moment(like.device)))
            return value

        return Pending(finish)

    def _buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Not zeros, on which products are faster; positive, as moments of the normaliser are."""
        key = (tuple(shape), like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = torch.rand(*shape, dtype=like.dtype, device=like.device)
        return self._buffers[key]


def moment(device: torch.device) -> Any:
    """Now, on the device's stream; `milliseconds` tells how far two of them are apart."""
    if device.type != "cuda":
        return time.perf_counter()
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: Any, end: Any) -> float:
    """Between two moments that have passed."""
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def beside_absent_ranks(rank: int, size: int, algorithm: Algorithm, node_ranks: int = 8) -> ContextRanks:
    """The place of one rank; nodes as `two_level` needs them."""
    node = rail = None
    if algorithm == "two_level":
        number, place = divmod(rank, node_ranks)
        node = AbsentChannel(place, node_ranks)
        rail = AbsentChannel(number, size // node_ranks) if size > node_ranks else None
    return ContextRanks(rank, size, AbsentChannel(rank, size), AbsentChannel(rank, size), node, rail, algorithm)


def plan_beside_absent_ranks(ranks: ContextRanks, tokens: int, device: torch.device) -> SequencePlan:
    """Slices of so many tokens, one document over all of them."""
    return SequencePlan(ranks, tuple(tokens * i for i in range(ranks.size + 1)), None, device)
