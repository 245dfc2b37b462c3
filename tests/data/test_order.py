"""The shuffled order of a source."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from based_megatron.data.order import Permutation, number_of, shuffled_together


def shuffled(numbers: np.ndarray, size: int, seed: int, source: str) -> np.ndarray:
    """The sequences of a single source."""
    return shuffled_together(np.zeros_like(numbers), numbers, [size], seed, [source])


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), key=st.text(max_size=8))
def test_permutation_is_a_bijection(size, key):
    assert np.array_equal(np.sort(Permutation(size, key)(np.arange(size))), np.arange(size))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 3000), key=st.text(max_size=8))
def test_the_inverse_leads_back(size, key):
    permutation, places = Permutation(size, key), np.arange(size)
    assert np.array_equal(permutation.inverse(permutation(places)), places)
    assert np.array_equal(permutation(permutation.inverse(places)), places)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 300), number=st.integers(0, 10**5))
def test_the_place_of_a_sequence_in_an_epoch_is_found(size, number):
    (sequence,) = shuffled(np.array([number]), size, 3, "source").tolist()
    assert number_of(sequence, number // size, size, 3, "source") == number


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 4095, 4096, 4097])
def test_permutation_is_a_bijection_around_powers_of_two(size):
    assert np.array_equal(np.sort(Permutation(size, "key")(np.arange(size))), np.arange(size))


def test_permutation_of_a_trillion_needs_no_index():
    size = 10**12
    images = Permutation(size, "key")(np.arange(0, size, size // 1000))
    assert len(np.unique(images)) == len(images) and images.min() >= 0 and images.max() < size
    # Uniform: the mean of 1000 draws is within five standard errors of the middle.
    assert abs(images.mean() / size - 0.5) < 5 * 0.2887 / 1000**0.5


def test_neighbours_land_far_apart():
    images = Permutation(100_000, "key")(np.arange(100_000))
    steps = np.abs(np.diff(images)) / 100_000
    assert abs(steps.mean() - 1 / 3) < 0.01  # the mean distance of two uniform draws


def test_position_alone_decides():
    permutation = Permutation(1000, "key")
    assert permutation(np.array([7, 800, 7])).tolist() == [permutation(np.array([i]))[0] for i in (7, 800, 7)]


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 300), epoch=st.integers(0, 10**6), seed=st.integers(0, 2**31))
def test_every_epoch_holds_every_sequence_once(size, epoch, seed):
    numbers = np.arange(epoch * size, (epoch + 1) * size)
    assert np.array_equal(np.sort(shuffled(numbers, size, seed, "source")), np.arange(size))


def test_epochs_seeds_and_sources_differ():
    numbers = np.arange(100)
    base = shuffled(numbers, 100, 1, "a").tolist()
    assert shuffled(numbers + 100, 100, 1, "a").tolist() != base
    assert shuffled(numbers, 100, 2, "a").tolist() != base
    assert shuffled(numbers, 100, 1, "b").tolist() != base


def test_a_window_over_an_epoch_boundary_equals_its_parts():
    both = shuffled(np.arange(90, 110), 100, 1, "a")
    parts = [shuffled(np.arange(90, 100), 100, 1, "a"), shuffled(np.arange(100, 110), 100, 1, "a")]
    assert np.array_equal(both, np.concatenate(parts))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    places=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2000)), max_size=30),
)
def test_sources_that_are_shuffled_together_are_shuffled_as_alone(sizes, places):
    places = [(which % len(sizes), number) for which, number in places]
    which, numbers = np.array(places, np.int64).reshape(-1, 2).T
    names = [f"source {place}" for place in range(len(sizes))]
    together = shuffled_together(which, numbers, sizes, 7, names).tolist()
    assert together == [int(shuffled(np.array([n]), sizes[w], 7, names[w])[0]) for w, n in places]


def test_order_does_not_change_between_versions():
    # A run of an older version must resume on the same data; change these only together with the manifest's version.
    assert shuffled(np.arange(8), 10, 42, "source").tolist() == [6, 5, 8, 2, 7, 9, 4, 0]
