"""Slices of held-out tokens: equal to a double loop over positions, bin edges, and what a document's border does."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from based_megatron.data.slices import MOST_SLICES, NO_SLICE, Slices, bigrams_of, repeat_distances, slices_of

COUNT_BINS = {"0": range(1), "1-9": range(1, 10), "10-99": range(10, 100), "100-999": range(100, 1000)}


def expected_key(tokens: list[int], documents: list[int], counts: dict, rare_count: float, ends, t: int):
    """(bin of counts, kind) of a position, by looking at every earlier one; None if its label is in another document."""
    if documents[t] != documents[t + 1]:
        return None
    count = counts.get((tokens[t], tokens[t + 1]), 0)
    bin_name = next((name for name, inside in COUNT_BINS.items() if count in inside), "1000_up")
    latest = None
    for s in range(t):
        same_document = documents[s] == documents[s + 1] == documents[t]
        if same_document and (tokens[s], tokens[s + 1]) == (tokens[t], tokens[t + 1]):
            latest = s
    if latest is None:
        return bin_name, "first"
    if count > rare_count:
        return bin_name, "common"
    low = 1
    for end in ends:
        if t - latest <= end:
            return bin_name, f"{low}-{end}"
        low = end + 1
    return bin_name, f"{low}_up"


@st.composite
def packed(draw):
    """(tokens, starts of documents in them, counts of some bigrams)."""
    tokens = draw(st.lists(st.integers(0, 3), min_size=2, max_size=60))
    starts = draw(st.sets(st.integers(1, len(tokens) - 1), max_size=6))
    pairs = st.tuples(st.integers(0, 3), st.integers(0, 3))
    counts = draw(st.dictionaries(pairs, st.sampled_from([0, 1, 2, 3, 9, 10, 99, 100, 999, 1000, 10**9])))
    return tokens, [0, *sorted(starts)], counts


@settings(max_examples=300, deadline=None)
@given(packed(), st.sampled_from([(1, 3, 10), (2,), (4, 16, 64)]), st.sampled_from([1.0, 2.0, 99.0, 1250.0]))
def test_every_position_is_in_the_slice_that_a_double_loop_finds(case, ends, rare_count):
    tokens, starts, counts = case
    slices = Slices(rare_count, ends)
    documents = [sum(start <= t for start in starts) for t in range(len(tokens))]
    bigrams = bigrams_of(np.array(tokens, np.uint16), vocab_size=4)
    found_counts = np.array([counts.get((a, b), 0) for a, b in pairwise(tokens)], np.float64)
    ids = slices.of_tokens(repeat_distances(bigrams, np.array(starts)), found_counts)
    assert ids.dtype == np.uint8
    for t, number in enumerate(ids.tolist()):
        key = expected_key(tokens, documents, counts, rare_count, ends, t)
        assert (None if number == NO_SLICE else slices.keys[number]) == key, f"position {t}"


def test_a_repeat_is_a_hit_up_to_the_rare_count():
    slices = Slices(9.0, (16,))
    ids = slices.of_tokens(np.full(3, 5), np.array([8.9, 9.0, 9.1]))
    assert [slices.keys[number] for number in ids] == [("1-9", "1-16"), ("1-9", "1-16"), ("1-9", "common")]


def test_a_scaled_count_between_0_and_1_was_seen():
    slices = Slices(1.0, (16,))
    ids = slices.of_tokens(np.zeros(3, np.int64), np.array([0.0, 0.3, 9.7]))
    assert [slices.keys[number] for number in ids] == [("0", "first"), ("1-9", "first"), ("1-9", "first")]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint32), (65537, np.int64)])
def test_bigrams_of_the_largest_ids_are_distinct(vocab_size, dtype):
    last = vocab_size - 1
    tokens = np.array([last, last, last - 1, 0, last], np.uint32)
    found = bigrams_of(tokens, vocab_size)
    assert found.dtype == dtype and len(set(found.tolist())) == 4
    assert found.tolist() == [a * vocab_size + b for a, b in pairwise(tokens.tolist())]


@pytest.mark.parametrize(
    ("window", "distances"),
    [
        (128, ["1-16", "17-64", "65-128", "129-512", "513_up"]),
        (32, ["1-16", "17-32", "33-64", "65-512", "513_up"]),
        (64, ["1-16", "17-64", "65-512", "513_up"]),
        (0, ["1-16", "17-64", "65-512", "513_up"]),
        (2048, ["1-16", "17-64", "65-512", "513-2048", "2049_up"]),
    ],
)
def test_the_window_is_an_edge_of_distances(window, distances):
    slices = slices_of(10**9, 0, window)
    assert slices.distances == distances
    assert slices.counts == ["0", "1-9", "10-99", "100-999", "1000_up"]


@pytest.mark.parametrize(
    ("training_tokens", "setting", "rare"),
    [(10_500_000_000, 0, 1250), (21_000_000_000, 0, 2500), (3_000_000, 0, 1), (3_000_000, 7, 7)],
)
def test_rare_is_zoologys_share_of_the_training_tokens(training_tokens, setting, rare):
    assert slices_of(training_tokens, setting, 128).rare_count == pytest.approx(rare)


def test_all_slices_have_a_number_below_the_most():
    probes = tuple(map(str, range(20)))
    slices = slices_of(10**9, 0, 128, probes)
    numbers = [slices.of_probe(name) for name in probes]
    assert numbers == list(range(len(slices.keys), len(slices.keys) + 20)) and max(numbers) < MOST_SLICES < NO_SLICE
