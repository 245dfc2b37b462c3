"""The weighted schedule over sources."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from based_megatron.data.mixture import PERIOD, Mixture, split_counts
from based_megatron.errors import ConfigError

weights_strategy = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@settings(max_examples=20, deadline=None)
@given(weights=weights_strategy, start=st.integers(0, 10**12), length=st.integers(1, 5000))
def test_every_window_has_the_weights(weights, start, length):
    source, _ = Mixture(weights).locate(np.arange(start, start + length))
    shares = np.array(weights) / sum(weights)
    # Each place is at most half a place per source away from its due time; rounding adds 1 / PERIOD a place.
    bound = 2 + len(weights) + length * len(weights) / PERIOD
    assert np.abs(np.bincount(source, minlength=len(weights)) - shares * length).max() <= bound


@settings(max_examples=20, deadline=None)
@given(share=st.integers(1, 99))
def test_every_prefix_of_two_sources_is_rounded_right(share):
    source, _ = Mixture([share, 100 - share]).locate(np.arange(1000))
    counted = np.cumsum(source == 0)
    assert np.abs(counted - np.arange(1, 1001) * share / 100).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.7, 0.2, 0.1], [1, 2, 3], [50, 49, 1]])
def test_usual_weights_are_exact_in_every_round_window(weights):
    window = 1200
    source, _ = Mixture(weights).locate(np.arange(5 * window, 6 * window))
    assert np.bincount(source).tolist() == [round(window * weight / sum(weights)) for weight in weights]


@settings(max_examples=20, deadline=None)
@given(weights=weights_strategy)
def test_each_source_counts_its_own_sequences_without_gaps(weights):
    numbers = np.arange(PERIOD - 2000, PERIOD + 2000)
    source, own = Mixture(weights).locate(numbers)
    before, _ = Mixture(weights).locate(np.arange(PERIOD - 2000))
    for i in range(len(weights)):
        first = int((before == i).sum())
        assert own[source == i].tolist() == list(range(first, first + int((source == i).sum())))


def test_a_tiny_weight_is_still_heard():
    source, _ = Mixture([1e9, 1.0]).locate(np.arange(PERIOD))
    assert np.bincount(source).tolist() == [PERIOD - 1, 1]


def test_one_source_is_its_own_stream():
    numbers = np.array([0, 1, PERIOD - 1, PERIOD, 10**12])
    source, own = Mixture([0.3]).locate(numbers)
    assert not source.any() and np.array_equal(own, numbers)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], [0.0, 0.0]])
def test_weights_that_are_no_shares_are_refused_with_their_key(weights):
    with pytest.raises(ConfigError, match=r"change data\.sources"):
        Mixture(weights)


def test_a_source_of_weight_0_changes_nothing():
    numbers = np.arange(PERIOD)
    (source, own), (with_more, own_too) = Mixture([3, 1]).locate(numbers), Mixture([3, 0, 1, 0]).locate(numbers)
    assert np.array_equal(np.array([0, 2])[source], with_more) and np.array_equal(own, own_too)
    assert split_counts([1, 0], [3, 9], 8) == [3, 0]


@settings(max_examples=20, deadline=None)
@given(weights=weights_strategy, scale=st.floats(0.001, 1000), data=st.data())
def test_shares_are_all_that_a_mixture_is(weights, scale, data):
    """Weights of one proportion are one mixture, and shares are weights of the same."""
    mixture = Mixture(weights)
    assert Mixture(mixture.shares).shares == mixture.shares
    doubled = Mixture([2 * weight for weight in weights])
    assert doubled.shares == mixture.shares
    numbers = np.array(data.draw(st.lists(st.integers(0, 10**12), min_size=1, max_size=20)))
    for other in (Mixture(mixture.shares), doubled):
        assert all(np.array_equal(a, b) for a, b in zip(other.locate(numbers), mixture.locate(numbers), strict=True))


@settings(max_examples=20, deadline=None)
@given(weights=weights_strategy, number=st.integers(0, 3 * PERIOD))
def test_places_and_counts_are_those_of_the_sequences(weights, number):
    mixture = Mixture(weights)
    source, own = mixture.locate(np.arange(number + 1))
    assert mixture.taken(number).tolist() == np.bincount(source[:-1], minlength=len(weights)).tolist()
    assert mixture.place(int(source[-1]), int(own[-1])) == number


@settings(max_examples=60, deadline=None)
@given(
    sources=st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 50)), min_size=1, max_size=5),
    total=st.integers(0, 300),
)
def test_split_counts_gives_all_it_can(sources, total):
    weights, available = zip(*sources, strict=True)
    counts = split_counts(weights, available, total)
    assert sum(counts) == min(total, sum(available))
    assert all(0 <= count <= limit for count, limit in zip(counts, available, strict=True))


def test_split_counts_follows_the_weights_until_a_source_runs_out():
    assert split_counts([3, 1], [100, 100], 40) == [30, 10]
    assert split_counts([3, 1], [100, 4], 40) == [36, 4]
