"""The simulation of ranks that wait for each other, against closed forms."""

import numpy as np
import pytest

from benchmarks.sequence_parallel.simulation import Segment, chain, collective, neighbours, simulate


@pytest.mark.parametrize("link_ms", [0.5, 2.0, 7.0])
def test_without_jitter_a_step_is_its_computation_and_what_covers_do_not_hide(link_ms):
    segments = [Segment(3.0, 2.0, 0.25, collective(link_ms))] * 4
    assert simulate(segments, segments, 16) == pytest.approx(8 * (3 + max(2, link_ms) + 0.25))


def test_a_chain_pays_its_skew_once_a_pass_and_not_once_a_layer():
    """A collective that takes as long pays it in every layer."""
    layers, ranks, hop_ms = 5, 8, 0.7
    chained = [Segment(3.0, 0.0, 0.0, chain([hop_ms] * (ranks - 1)))] * layers
    together = [Segment(3.0, 0.0, 0.0, collective(hop_ms * (ranks - 1)))] * layers
    assert simulate(chained, chained, ranks) == pytest.approx(2 * (layers * 3 + (ranks - 1) * hop_ms))
    assert simulate(together, together, ranks) == pytest.approx(2 * layers * (3 + (ranks - 1) * hop_ms))


def test_a_chain_is_its_recursion():
    """arrival(r + 1) = max(arrival(r), start(r)) + hop(r), written out."""
    start = np.array([3.0, 0.0, 9.0, 1.0])
    hops = [1.0, 2.0, 4.0]
    arrivals = [-np.inf]
    for rank, hop in enumerate(hops):
        arrivals.append(max(arrivals[-1], start[rank]) + hop)
    assert chain(hops)(start).tolist() == arrivals == [-np.inf, 4, 6, 13]


def test_a_halo_waits_for_one_neighbour():
    assert neighbours([1.0, 2.0])(np.array([5.0, 0.0, 0.0])).tolist() == [-np.inf, 6, 2]
    segments = [Segment(1.0, 2.0, 0.0, neighbours([2.5] * 3))] * 3
    assert simulate(segments, segments, 4) == pytest.approx(6 * 3.5)


def test_backward_runs_from_right_to_left():
    """Only the last rank waits forward; it is the first of the backward pass, which waits for nothing."""
    forward = [Segment(1.0, 0.0, 0.0, chain([0.0, 10.0]))]
    backward = [Segment(1.0, 0.0, 0.0, chain([4.0, 0.0]))]
    assert simulate(forward, backward, 3) == pytest.approx(1 + 10 + 1 + 4)


def test_jitter_is_seeded_and_only_slows():
    segments = [Segment(3.0, 2.0, 0.5, collective(1.0))] * 6
    exact = simulate(segments, segments, 32)
    drawn = [simulate(segments, segments, 32, jitter=0.02, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and min(drawn) > exact


def test_slower_links_and_more_jitter_never_make_a_step_faster():
    def step(link_ms: float, jitter: float) -> float:
        segments = [Segment(3.0, 1.0, 0.0, collective(link_ms)), Segment(1.0, 1.0, 0.0, neighbours([link_ms] * 15))]
        return simulate(segments, segments, 16, jitter)

    for jitter in (0.0, 0.05):
        times = [step(link_ms, jitter) for link_ms in (0.0, 0.5, 1.0, 2.0, 4.0)]
        assert times == sorted(times) and times[-1] > times[0]
    assert step(1.0, 0.0) < step(1.0, 0.01) < step(1.0, 0.1)
