"""A discrete-event model of one training step of many ranks, and of the reduction of their gradients.

A rank computes, starts an exchange, computes what covers it, and waits until it is there. Every dependency of a causal Based
model runs from left to right forward and from right to left backward, so ranks may drift apart: a chain of messages lets
them (its skew is paid once a pass), a collective brings them together each time.

Legend: P ranks, in the order of their slices. Times are in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.sequence_parallel.links import Links

Times = np.ndarray
"""[P] fp64, one for each rank, in the direction in which the pass runs."""
Arrival = Callable[[Times], Times]
"""Maps the times at which ranks start an exchange to the times at which they have what they asked for."""


@dataclass(frozen=True)
class Segment:
    """A rank's work from one layer's exchange to the next."""

    before_ms: float
    """Computation up to the start of the exchange."""
    cover_ms: float
    """Computation between the start and the wait."""
    after_ms: float
    """Computation for the exchange itself, once everything is there."""
    arrival: Arrival | None = None
    """None: nothing is asked of other ranks."""


def collective(ms: float) -> Arrival:
    """An exchange in which all wait for the last one."""
    return lambda start_P: np.full_like(start_P, start_P.max() + ms)


def chain(hops_ms: Sequence[float]) -> Arrival:
    """An exchange in which each rank hands on what it got and has, once it has both; hops_ms[r] is the time from rank r to r + 1. The first
    asks for nothing.

    Sends are buffered: a sender does not wait for its receiver.
    """
    from_first_P = np.concatenate([[0.0], np.cumsum(hops_ms)])

    def arrive(start_P: Times) -> Times:
        latest_P = np.maximum.accumulate(start_P - from_first_P)
        return np.concatenate([[-np.inf], latest_P[:-1] + from_first_P[1:]])

    return arrive


def neighbours(hops_ms: Sequence[float]) -> Arrival:
    """A halo: each rank gets what the one before it has sent, and no more. Both ends must have asked for it."""
    hops = np.asarray(hops_ms)

    def arrive(start_P: Times) -> Times:
        return np.concatenate([[-np.inf], np.maximum(start_P[:-1], start_P[1:]) + hops])

    return arrive


def simulate(
    forward: Sequence[Segment], backward: Sequence[Segment], ranks: int, jitter: float = 0.0, seed: int = 0
) -> float:
    """Milliseconds until the last of the ranks is done with both passes.

    jitter: each piece of computation takes 1 + |normal(0, jitter)| times as long, drawn anew for each rank.
    """
    draw = np.random.default_rng(seed)

    def computed(ms: float) -> Times:
        return ms * (1 + np.abs(draw.normal(0, jitter, ranks)))

    def run(segments: Sequence[Segment], now_P: Times) -> Times:
        for segment in segments:
            start_P = now_P + computed(segment.before_ms)
            ready_P = start_P + computed(segment.cover_ms)
            if segment.arrival is not None:
                ready_P = np.maximum(ready_P, segment.arrival(start_P))
            now_P = ready_P + computed(segment.after_ms)
        return now_P

    reversed_P = run(forward, np.zeros(ranks))[::-1]
    return float(run(backward, reversed_P).max())


def gradients_exposed_ms(
    links: Links, ranks: int, buckets: Sequence[int], forward_ms: float, backward_ms: float, usable: float = 0.9
) -> float:
    """Time of ZeRO-1's communication that is not hidden: fp32 gradients are reduced and scattered during backward, bf16 parameters gathered
    during the next forward pass.

    buckets: elements of each, in the order of the forward pass. The first has nothing to hide behind: its gradients are complete
    last, its parameters are read first.
    usable: share of a pass that can hide the others.
    """

    def exposed_ms(number_bytes: int, compute_ms: float) -> float:
        first, *others = (links.reduce_scatter_us(ranks, number_bytes * n / ranks) / 1e3 for n in buckets)
        return first + max(0.0, sum(others) - usable * compute_ms)

    return exposed_ms(4, backward_ms) + exposed_ms(2, forward_ms) if ranks > 1 else 0.0
