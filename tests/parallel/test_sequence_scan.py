"""Sums of states over slices, by every algorithm, equal the sum written out over pairs of slices, forward and backward."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from based_megatron.parallel.sequence.ranks import ContextRanks
from based_megatron.parallel.sequence.scan import SMALL_STATE_BYTES, choose, start_gated_sum
from support.sequence import flows, gap, on_threads, plan_for, seeded

EXACT = 1e-12
ALGORITHMS: list[tuple[Any, int]] = [("all_gather", 0), ("chain", 0), ("two_level", 2), ("two_level", 4)]


def expected_sums(bounds: tuple[int, ...], ids: Tensor | None, states: Tensor, reverse: bool) -> Tensor:
    """[P, B, ...]."""
    size, rows = states.shape[:2]
    gates = torch.zeros(size, size, rows, dtype=states.dtype)
    for r, p, b in itertools.product(range(size), range(size), range(rows)):
        row = torch.zeros(bounds[-1]) if ids is None else ids[b]
        gates[r, p, b] = flows(row, bounds, *((r, p) if reverse else (p, r)))
    return torch.einsum("rpb,pb...->rb...", gates, states)


def check(
    bounds: tuple[int, ...], ids: Tensor | None, algorithm: Any, node_ranks: int, reverse: bool, dtype=torch.float64
) -> None:
    size, rows = len(bounds) - 1, 2 if ids is None else len(ids)
    states = seeded(size, rows, 3, 7, seed=1).to(dtype)
    if not plan_for(ContextRanks(0, size), bounds, ids).crosses:
        return

    def program(ranks: ContextRanks) -> Tensor:
        return start_gated_sum(states[ranks.rank], plan_for(ranks, bounds, ids), reverse=reverse).wait()

    found = on_threads(size, program, algorithm, node_ranks)
    assert gap(torch.stack(found), expected_sums(bounds, ids, states, reverse)) < EXACT


@st.composite
def cases(draw):
    """(bounds, ids or None) of 4 or 8 slices."""
    size = draw(st.sampled_from([4, 8]))
    lengths = draw(st.lists(st.integers(1, 3), min_size=size, max_size=size))
    bounds = tuple(itertools.accumulate([0, *lengths]))
    if draw(st.booleans()):
        return bounds, None
    # Few starts, so that documents cover several slices.
    starts = draw(st.lists(st.lists(st.integers(1, bounds[-1]), max_size=4), min_size=1, max_size=3))
    ids = torch.zeros(len(starts), bounds[-1], dtype=torch.int32)
    for row, places in enumerate(starts):
        for place in places:
            ids[row, place:] += 1
    return bounds, ids


@pytest.mark.parametrize(("algorithm", "node_ranks"), ALGORITHMS)
@settings(max_examples=40, deadline=None)
@given(cases(), st.booleans())
def test_every_algorithm_sums_the_slices_of_the_document(algorithm, node_ranks, case, reverse):
    check(*case, algorithm, node_ranks, reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("algorithm", "node_ranks"), ALGORITHMS)
def test_a_reset_inside_a_middle_slice_stops_the_sum(algorithm, node_ranks, reverse):
    """Slices of 8, documents of 12: the second slice ends one document and begins another."""
    ids = (torch.arange(32) >= 12).int()[None]
    check((0, 8, 16, 24, 32), ids, algorithm, node_ranks, reverse)


@pytest.mark.parametrize(("algorithm", "node_ranks"), ALGORITHMS)
def test_a_sum_is_never_a_difference(algorithm, node_ranks):
    """`Inclusive minus own` would lose every digit here, and leave rounding on the first rank."""
    bounds = (0, 1, 2, 3, 4)

    def program(ranks: ContextRanks) -> Tensor:
        state = torch.full((1, 3), 0.1 * (1e30 if ranks.rank == 3 else 1))
        return start_gated_sum(state, plan_for(ranks, bounds, None)).wait()

    found = on_threads(4, program, algorithm, node_ranks)
    assert float(found[0].abs().max()) == 0.0
    assert torch.allclose(found[3], torch.full((1, 3), 0.3))


def test_which_algorithm():
    node: Any = object()
    assert choose(ContextRanks(0, 8), 1) == choose(ContextRanks(0, 64), 1 << 30) == "all_gather"
    assert choose(ContextRanks(0, 8, node=node), SMALL_STATE_BYTES) == "all_gather"
    assert choose(ContextRanks(0, 8, node=node), SMALL_STATE_BYTES + 1) == "two_level"
    assert choose(ContextRanks(0, 16, node=node), 1) == "two_level"
    assert choose(ContextRanks(0, 16, node=node, algorithm="chain"), 1) == "chain"
