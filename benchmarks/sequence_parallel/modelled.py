"""Exchanges and steps of many ranks, modelled from measured times and assumed links.

Legend: P ranks that share a sequence, S its tokens, L = S / P tokens of a rank.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from based_megatron.bench.keys import Passes
from benchmarks.sequence_parallel.links import Links
from benchmarks.sequence_parallel.results import (
    ExposedExchange,
    Layer,
    LinkCost,
    Measured,
    ScaledStep,
    Way,
)
from benchmarks.sequence_parallel.step_model import STATE_WAYS, StepModel, local_work_ms, state_exchange_us
from benchmarks.sequence_parallel.traffic import LayerTraffic

SEVERAL_SEQUENCES = (16384, 64)
"""L and P of the step that is also modelled with eight sequences at once: eight of a million tokens."""


def link_costs(links: Links, traffic: LayerTraffic, L: int, rank_counts: Sequence[int]) -> list[LinkCost]:
    """Bytes and times of what one layer sends in one pass, in our and other ways to share a sequence."""
    return [
        cost
        for P in rank_counts
        for cost in (*_state_costs(links, traffic, L, P), *_window_costs(links, traffic, L, P), _conv_cost(links, traffic, L, P))
    ]  # fmt: skip


def exposed_exchanges(
    links: Links, traffic: LayerTraffic, measured: Measured, lengths: Sequence[int], rank_counts: Sequence[int]
) -> list[ExposedExchange]:
    """The time that a layer's exchange costs a rank beyond its cover, if all ranks are ready at once."""
    found = []
    for L, P in itertools.product(lengths, rank_counts):
        many = links.node_ranks < P
        costs = {
            Layer.LINEAR_ATTENTION: (
                state_exchange_us(links, traffic, P, Way.AUTO) / 1e3,
                local_work_ms(measured, traffic, P, Way.AUTO),
            ),
            Layer.SLIDING_WINDOW: (links.send_us(traffic.window_halo_bytes, many) / 1e3, 0.0),
            Layer.GATED_CONV: (links.send_us(traffic.conv_halo_bytes, many) / 1e3, 0.0),
        }
        for layer, (link_ms, own_ms) in costs.items():
            forward_ms, backward_ms = (
                measured.cover_ms(layer, passes, L) for passes in (Passes.FORWARD, Passes.BACKWARD)
            )
            exposed_ms = max(0.0, link_ms - forward_ms) + max(0.0, link_ms - backward_ms)
            found.append(
                ExposedExchange(
                    layer, P, L, 1e3 * exposed_ms, 1e3 * link_ms, 1e3 * forward_ms, 1e3 * backward_ms, 1e3 * own_ms
                )
            )
    return found


def scaled_steps(
    links: Links, traffic: LayerTraffic, measured: Measured, rank_counts: Sequence[int], seed: int,
    sequence_tokens: tuple[float, float],
) -> list[ScaledStep]:  # fmt: skip
    """Steps of every length that was measured with every number of ranks, where S is between two numbers of tokens."""
    shortest, longest = sequence_tokens
    models = [
        StepModel(links, traffic, measured, L, P, P)
        for L, P in itertools.product(measured.lengths(), rank_counts)
        if shortest <= L * P <= longest
    ]
    models += [dataclasses.replace(m, gpus=8 * m.ranks) for m in models if (m.tokens, m.ranks) == SEVERAL_SEQUENCES]
    return [_scaled_step(model, seed) for model in models]


def _state_costs(links: Links, traffic: LayerTraffic, L: int, P: int) -> list[LinkCost]:
    inside_bytes, between_bytes = traffic.two_level_bytes(P, links.node_ranks)
    all_to_all_bytes = traffic.linear_all_to_all_bytes(L)

    def cost(way: Way, megabytes: float | None = None, network_megabytes: float | None = None) -> LinkCost:
        us = state_exchange_us(links, traffic, P, way)
        return LinkCost(Layer.LINEAR_ATTENTION, way, P, L, us, megabytes, network_megabytes)

    return [
        cost(Way.AUTO),
        cost(Way.ALL_GATHER, traffic.all_gather_bytes(P, traffic.state_bytes) / 1e6),
        cost(Way.TWO_LEVEL, inside_bytes / 1e6, between_bytes / 1e6),
        cost(Way.TWO_LEVEL_DOUBLING),
        cost(Way.CHAIN, traffic.state_bytes / 1e6),
        cost(Way.LASP2, traffic.all_gather_bytes(P, traffic.unpacked_state_bytes) / 1e6),
        _ulysses_cost(links, traffic, Layer.LINEAR_ATTENTION, L, P, all_to_all_bytes),
    ]


def _window_costs(links: Links, traffic: LayerTraffic, L: int, P: int) -> list[LinkCost]:
    halo_us = links.send_us(traffic.window_halo_bytes, links.node_ranks < P)
    ring_us = links.ring_attention_us(P, traffic.slice_keys_bytes(L))
    ring_megabytes = traffic.ring_attention_bytes(P, L) / 1e6
    return [
        LinkCost(Layer.SLIDING_WINDOW, Way.HALO, P, L, halo_us, traffic.window_halo_bytes / 1e6),
        LinkCost(Layer.SLIDING_WINDOW, Way.RING_ATTENTION, P, L, ring_us, ring_megabytes),
        _ulysses_cost(links, traffic, Layer.SLIDING_WINDOW, L, P, traffic.window_all_to_all_bytes(L)),
    ]


def _conv_cost(links: Links, traffic: LayerTraffic, L: int, P: int) -> LinkCost:
    halo_us = links.send_us(traffic.conv_halo_bytes, links.node_ranks < P)
    return LinkCost(Layer.GATED_CONV, Way.HALO, P, L, halo_us, traffic.conv_halo_bytes / 1e6)


def _ulysses_cost(
    links: Links, traffic: LayerTraffic, layer: Layer, L: int, P: int, all_to_all_bytes: float
) -> LinkCost:
    """Two all-to-alls, each of half the bytes; not possible with more ranks than heads."""
    megabytes = (P - 1) / P * all_to_all_bytes / 1e6
    if traffic.heads < P:
        obstacle = f"not possible: {P} ranks, {traffic.heads} heads"
        return LinkCost(layer, Way.ULYSSES, P, L, None, megabytes, obstacle=obstacle)
    return LinkCost(layer, Way.ULYSSES, P, L, 2 * links.all_to_all_within_us(P, all_to_all_bytes / 2), megabytes)


def _scaled_step(model: StepModel, seed: int) -> ScaledStep:
    alone_ms, gradients_ms = model.alone_ms, model.gradients_ms
    steps_ms = {way: model.step_ms(way, seed) for way in STATE_WAYS}
    ours_ms = steps_ms[Way.AUTO]
    step = ScaledStep(
        model.ranks,
        model.tokens,
        model.gpus,
        {way: 100 * alone_ms / (ms + gradients_ms) for way, ms in steps_ms.items()},
        percent_without_gradients=100 * alone_ms / ours_ms,
        percent_without_jitter=100 * alone_ms / (model.step_ms(Way.AUTO, seed, jitter=0.0) + gradients_ms),
        alone_ms=alone_ms,
        exchanges_ms=ours_ms - alone_ms,
        gradients_exposed_ms=gradients_ms,
        tokens_per_second=1e3 * model.tokens / (ours_ms + gradients_ms),
    )
    if model.tokens not in model.measured.lengths(as_graph=True):
        return step
    graph = dataclasses.replace(model, as_graph=True)
    graph_ms = graph.step_ms(Way.AUTO, seed) + graph.gradients_ms
    return dataclasses.replace(
        step,
        percent_as_graph=100 * graph.alone_ms / graph_ms,
        tokens_per_second_as_graph=1e3 * model.tokens / graph_ms,
    )
