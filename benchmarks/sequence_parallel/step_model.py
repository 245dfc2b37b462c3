"""From the measured times of one rank to a step of many: what each layer computes, starts, covers and waits for.

Each layer is taken to have the same share of a pass. Its exchange starts, is covered and is waited for as in the mixers.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from based_megatron.bench.links import Links
from based_megatron.bench.rank_steps import SLICES
from based_megatron.bench.report import Row
from based_megatron.bench.scaling import (
    Arrival,
    Segment,
    chain,
    collective,
    gradients_exposed_ms,
    neighbours,
    simulate,
)
from based_megatron.bench.traffic import LayerTraffic
from based_megatron.parallel.sequence.ranks import ContextRanks
from based_megatron.parallel.sequence.scan import choose

Variant = Literal["auto", "all_gather", "two_level", "two_level with doubling", "chain", "LASP-2, not overlapped"]
VARIANTS: tuple[Variant, ...] = (
    "auto",
    "all_gather",
    "two_level",
    "two_level with doubling",
    "chain",
    "LASP-2, not overlapped",
)
"""What moves the states. `auto` is what the code chooses; the last and `doubling` are not in it."""
JITTER = 0.01
"""Assumed: relative spread of the time of each piece of computation."""
DRAWS = 5
KINDS = {"L": "state", "S": "window", "c": "conv"}


class Measured:
    """Values of rows by work and shape."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = [row for row in rows if not row.failure]
        self._values = {(row.work, row.shape): row.value for row in self._rows}

    def at(self, work: str, shape: str) -> float:
        """Raises KeyError if it was not measured."""
        if (work, shape) not in self._values:
            raise KeyError(f"{work} {shape} was not measured in this run: drop --only, or give --measured FILE")
        return self._values[work, shape]

    def has(self, work: str, shape: str) -> bool:
        """Whether `at` finds it."""
        return (work, shape) in self._values

    def lengths(self) -> list[int]:
        """L of which there are whole steps."""
        return sorted(
            int(shape.removeprefix("L")) for work, shape in self._values if work == "step: slice, forward + backward"
        )

    def slowdown(self, of: str, gb_per_s: float) -> float:
        """Time beside a copy over time alone, at the rate next to that of a link; 1 if it was not measured."""
        found = [row for row in self._rows if row.work == f"slowdown of {of} beside a copy"]
        nearest = min(found, key=lambda row: abs(row.rates["GB/s copied"] - gb_per_s), default=None)
        return 1.0 if nearest is None else max(1.0, nearest.value)


def state_algorithm(ranks: int, state_bytes: int) -> Literal["all_gather", "two_level", "chain"]:
    """What `parallel.state_exchange: auto` chooses where ranks fill nodes."""
    node: object = object()
    return choose(ContextRanks(0, ranks, node=node), state_bytes)  # type: ignore[arg-type]


def state_exchange_us(links: Links, traffic: LayerTraffic, ranks: int, variant: Variant) -> float:
    """Time on the links of one exchange of states, if all ranks are ready at once."""
    size = traffic.state_bytes
    if variant == "auto":
        variant = state_algorithm(ranks, size)
    if variant == "all_gather":
        return links.all_gather_us(ranks, size)
    if variant == "chain":
        return links.chain_us(ranks, size)
    if variant == "LASP-2, not overlapped":
        return links.all_gather_us(ranks, traffic.unpacked_state_bytes)
    return links.two_level_us(ranks, size, doubling=variant == "two_level with doubling")


def local_ms(measured: Measured, traffic: LayerTraffic, ranks: int, variant: Variant) -> float:
    """What a rank computes for one exchange, beyond its moments."""
    algorithm = state_algorithm(ranks, traffic.state_bytes) if variant == "auto" else variant
    name = {"two_level with doubling": "two_level", "LASP-2, not overlapped": "all_gather"}.get(algorithm, algorithm)
    return measured.at(f"state: local work, {name}", f"P{ranks}")


@dataclass(frozen=True)
class StepModel:
    """A step of a micro batch of one sequence a rank."""

    links: Links
    traffic: LayerTraffic
    measured: Measured
    tokens: int
    """L, of a rank."""
    ranks: int
    """P, that share a sequence."""
    gpus: int
    """Ranks of all sequences together, which reduce gradients."""
    as_graph: bool = False
    """Take the steps that were replayed as CUDA graphs: without the host's time to launch them."""

    @property
    def alone_ms(self) -> float:
        """The same tokens on one rank that shares nothing."""
        return self._total("step: whole sequence")

    @property
    def gradients_ms(self) -> float:
        """Exposed part of the gradients' reduction."""
        forward = self._forward("step: whole sequence")
        parameters = 1e6 * self.measured.at("parameters", "")
        return gradients_exposed_ms(self.links, self.gpus, parameters, forward, self.alone_ms - forward)

    def step_ms(self, variant: Variant, seed: int, jitter: float = JITTER) -> float:
        """Until the last rank is done; the mean over some draws."""
        forward, backward = self._segments(variant, "forward"), self._segments(variant, "backward")
        draws = [simulate(forward, backward, self.ranks, jitter, seed + i) for i in range(DRAWS if jitter else 1)]
        return statistics.fmean(draws)

    def _segments(self, variant: Variant, way: str) -> list[Segment]:
        forward = self._forward("step: slice")
        of_pass = forward if way == "forward" else self._total("step: slice") - forward
        share = of_pass / len(self.traffic.letters)
        letters = self.traffic.letters if way == "forward" else self.traffic.letters[::-1]
        return [self._segment(letter, variant, way, share) for letter in letters]

    def _segment(self, letter: str, variant: Variant, way: str, share_ms: float) -> Segment:
        if letter not in KINDS:
            return Segment(share_ms, 0.0, 0.0)
        cover = min(share_ms, self.measured.at(f"{KINDS[letter]}: cover {way}", f"L{self.tokens}"))
        arrival, link_ms = self._exchange(letter, variant, way)
        if letter == "L" and variant == "LASP-2, not overlapped":
            return Segment(share_ms, 0.0, 0.0, arrival)
        slowed = cover + (self._slowdown(letter, way) - 1) * min(cover, link_ms)
        return Segment(share_ms - cover, slowed, self._own_work(letter, variant), arrival)

    def _exchange(self, letter: str, variant: Variant, way: str) -> tuple[Arrival, float]:
        """When it is there, and how long it moves bytes."""
        if letter != "L":
            size = self.traffic.window_halo_bytes if letter == "S" else self.traffic.conv_halo_bytes
            hops = self._hops(size, way)
            return neighbours(hops), max(hops, default=0.0)
        ms = state_exchange_us(self.links, self.traffic, self.ranks, variant) / 1e3
        if variant == "chain":
            # A hop at a time, which takes few multiprocessors from what covers it.
            return chain(self._hops(self.traffic.state_bytes, way)), 0.0
        return collective(ms), ms

    def _hops(self, size_bytes: float, way: str) -> list[float]:
        hops = [us / 1e3 for us in self.links.hops_us(self.ranks, size_bytes)]
        return hops if way == "forward" else hops[::-1]

    def _own_work(self, letter: str, variant: Variant) -> float:
        """Beyond that of the step that was measured, which sums the states of a few ranks after an all-gather."""
        if letter != "L":
            return 0.0
        own = functools.partial(local_ms, self.measured, self.traffic)
        return max(0.0, own(self.ranks, variant) - self.measured.at("state: local work, all_gather", f"P{SLICES}"))

    def _slowdown(self, letter: str, way: str) -> float:
        covering: dict[tuple[str, str], str] = {
            ("L", "forward"): "query projection",
            ("L", "backward"): "dq",
            ("S", "forward"): "window projection",
            ("c", "forward"): "window projection",
        }
        name = covering.get((letter, way))
        return self.measured.slowdown(name, self.links.nvlink_gb_per_s) if name else 1.0

    def _total(self, step: str) -> float:
        suffix = " as a CUDA graph" if self.as_graph else ""
        return self.measured.at(f"{step}, forward + backward{suffix}", f"L{self.tokens}")

    def _forward(self, step: str) -> float:
        """A graph's time is divided between the passes as that of the step launched one by one."""
        eager = [
            self.measured.at(f"{step}, {passes}", f"L{self.tokens}") for passes in ("forward", "forward + backward")
        ]
        return self._total(step) * eager[0] / eager[1]
