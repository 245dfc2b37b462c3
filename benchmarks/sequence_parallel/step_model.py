"""A step of many ranks, modelled from the measured times of one: what each layer computes, starts, covers and waits for.

Each layer is taken to have the same share of a pass. Its exchange starts, is covered and is waited for as in the mixers.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from based_megatron.bench.keys import Passes
from based_megatron.parallel.sequence.ranks import ContextRanks
from based_megatron.parallel.sequence.scan import choose
from benchmarks.sequence_parallel.links import Links
from benchmarks.sequence_parallel.rank_steps import SLICES
from benchmarks.sequence_parallel.results import LAYERS, CoveringKernel, Layer, Measured, Sharing, Way
from benchmarks.sequence_parallel.simulation import (
    Arrival,
    Segment,
    chain,
    collective,
    gradients_exposed_ms,
    neighbours,
    simulate,
)
from benchmarks.sequence_parallel.traffic import LayerTraffic

STATE_WAYS = (Way.AUTO, Way.ALL_GATHER, Way.TWO_LEVEL, Way.TWO_LEVEL_DOUBLING, Way.CHAIN, Way.LASP2)
"""Ways to sum states. AUTO is what the code chooses; LASP2 is not overlapped with computation."""
LOCAL_WORK = {Way.TWO_LEVEL_DOUBLING: Way.TWO_LEVEL, Way.LASP2: Way.ALL_GATHER}
"""The measured way whose local work is taken where a way was not measured."""
COVERING_KERNELS = {
    (Layer.LINEAR_ATTENTION, Passes.FORWARD): CoveringKernel.QUERY_PROJECTION,
    (Layer.LINEAR_ATTENTION, Passes.BACKWARD): CoveringKernel.DQ,
    (Layer.SLIDING_WINDOW, Passes.FORWARD): CoveringKernel.WINDOW_PROJECTION,
    (Layer.GATED_CONV, Passes.FORWARD): CoveringKernel.WINDOW_PROJECTION,
}
"""The kernel whose measured slowdown stands for that of a cover."""
JITTER = 0.01
"""Assumed: relative spread of the time of each piece of computation."""
DRAWS = 5


def state_way(ranks: int, state_bytes: int) -> Way:
    """The way that `parallel.state_exchange: auto` chooses where ranks fill nodes."""
    node: object = object()
    return Way(choose(ContextRanks(0, ranks, node=node), state_bytes))  # type: ignore[arg-type,call-arg]


def state_exchange_us(links: Links, traffic: LayerTraffic, ranks: int, way: Way) -> float:
    """Time on the links of one exchange of states, if all ranks are ready at once."""
    size = traffic.state_bytes
    if way is Way.AUTO:
        way = state_way(ranks, size)
    if way is Way.ALL_GATHER:
        return links.all_gather_us(ranks, size)
    if way is Way.CHAIN:
        return links.chain_us(ranks, size)
    if way is Way.LASP2:
        return links.all_gather_us(ranks, traffic.unpacked_state_bytes)
    return links.two_level_us(ranks, size, doubling=way is Way.TWO_LEVEL_DOUBLING)


def local_work_ms(measured: Measured, traffic: LayerTraffic, ranks: int, way: Way) -> float:
    """Computation of a rank for one exchange, beyond its moments."""
    chosen = state_way(ranks, traffic.state_bytes) if way is Way.AUTO else way
    return measured.local_work_ms(LOCAL_WORK.get(chosen, chosen), ranks)


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
        """Time of as many tokens on one rank that shares nothing."""
        return self._total(Sharing.WHOLE)

    @property
    def gradients_ms(self) -> float:
        """Exposed part of the gradients' reduction."""
        forward = self._forward(Sharing.WHOLE)
        buckets = self.traffic.zero_buckets(self.gpus)
        return gradients_exposed_ms(self.links, self.gpus, buckets, forward, self.alone_ms - forward)

    def step_ms(self, way: Way, seed: int, jitter: float = JITTER) -> float:
        """Time until the last rank is done; the mean over some draws."""
        forward, backward = self._segments(way, Passes.FORWARD), self._segments(way, Passes.BACKWARD)
        draws = [simulate(forward, backward, self.ranks, jitter, seed + i) for i in range(DRAWS if jitter else 1)]
        return statistics.fmean(draws)

    def _segments(self, way: Way, passes: Passes) -> list[Segment]:
        forward_ms = self._forward(Sharing.SLICE)
        is_forward = passes is Passes.FORWARD
        pass_ms = forward_ms if is_forward else self._total(Sharing.SLICE) - forward_ms
        share_ms = pass_ms / len(self.traffic.letters)
        letters = self.traffic.letters if is_forward else self.traffic.letters[::-1]
        return [self._segment(LAYERS.get(letter), way, passes, share_ms) for letter in letters]

    def _segment(self, layer: Layer | None, way: Way, passes: Passes, share_ms: float) -> Segment:
        if layer is None:
            return Segment(share_ms, 0.0, 0.0)
        cover = min(share_ms, self.measured.cover_ms(layer, passes, self.tokens))
        arrival, link_ms = self._exchange(layer, way, passes)
        if layer is Layer.LINEAR_ATTENTION and way is Way.LASP2:
            return Segment(share_ms, 0.0, 0.0, arrival)
        slowed = cover + (self._slowdown(layer, passes) - 1) * min(cover, link_ms)
        return Segment(share_ms - cover, slowed, self._own_work(layer, way), arrival)

    def _exchange(self, layer: Layer, way: Way, passes: Passes) -> tuple[Arrival, float]:
        """When it is there, and how long it moves bytes."""
        if layer is not Layer.LINEAR_ATTENTION:
            is_window = layer is Layer.SLIDING_WINDOW
            hops = self._hops(self.traffic.window_halo_bytes if is_window else self.traffic.conv_halo_bytes, passes)
            return neighbours(hops), max(hops, default=0.0)
        ms = state_exchange_us(self.links, self.traffic, self.ranks, way) / 1e3
        if way is Way.CHAIN:
            # A hop at a time, which takes few multiprocessors from what covers it.
            return chain(self._hops(self.traffic.state_bytes, passes)), 0.0
        return collective(ms), ms

    def _hops(self, size_bytes: float, passes: Passes) -> list[float]:
        hops = [us / 1e3 for us in self.links.hops_us(self.ranks, size_bytes)]
        return hops if passes is Passes.FORWARD else hops[::-1]

    def _own_work(self, layer: Layer, way: Way) -> float:
        """Work beyond that of the step that was measured, which sums the states of a few ranks after an all-gather."""
        if layer is not Layer.LINEAR_ATTENTION:
            return 0.0
        own_ms = local_work_ms(self.measured, self.traffic, self.ranks, way)
        return max(0.0, own_ms - self.measured.local_work_ms(Way.ALL_GATHER, SLICES))

    def _slowdown(self, layer: Layer, passes: Passes) -> float:
        kernel = COVERING_KERNELS.get((layer, passes))
        return self.measured.slowdown(kernel, self.links.nvlink_gb_per_s) if kernel else 1.0

    def _total(self, sharing: Sharing) -> float:
        return self.measured.step_ms(sharing, Passes.BOTH, self.tokens, self.as_graph)

    def _forward(self, sharing: Sharing) -> float:
        """A graph's time is divided between the passes as that of the step launched one by one."""
        forward_ms, both_ms = (
            self.measured.step_ms(sharing, passes, self.tokens) for passes in (Passes.FORWARD, Passes.BOTH)
        )
        return self._total(sharing) * forward_ms / both_ms
