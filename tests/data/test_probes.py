"""Synthetic probes: each asked id can be told from the context, and from nothing else."""

import math
from collections import Counter

import numpy as np
import pytest

from based_megatron.data.probes import INDUCTION_IDS, MQAR_PAIRS, Probe, ProbeSequences
from based_megatron.data.slices import NO_SLICE, slices_of

VOCAB, LENGTH = 4096, 1024
EVERY = [Probe("induction", r) for r in INDUCTION_IDS] + [Probe("mqar", pairs) for pairs in MQAR_PAIRS]


@pytest.mark.parametrize("probe", EVERY, ids=lambda probe: probe.name)
def test_what_is_asked_for_stood_once_after_the_same_id(probe):
    tokens, places = probe.make(np.arange(1024, 3072), np.random.default_rng(0))
    assert len(tokens) == probe.tokens and len(places) == probe.size - (probe.task == "induction")
    assert len(set(places.tolist())) == len(places)
    for place in places.tolist():
        before = np.flatnonzero(tokens[:place] == tokens[place])
        assert len(before) == 1, "one binding, no other"
        assert tokens[before[0] + 1] == tokens[place + 1]
    assert tokens.min() >= 1024 and tokens.max() < 3072


def test_queries_lie_as_the_power_law_says():
    """The nearer half of the slots has far more than half of the queries."""
    probe, random = Probe("mqar", 8), np.random.default_rng(0)
    gaps = Counter()
    for _ in range(400):
        _, places = probe.make(np.arange(1000), random)
        gaps.update(((places - 16) // 2).tolist())
    assert set(gaps) == set(range(24)), "every slot"
    assert gaps[0] > 0.85 * 400 and gaps[0] > 2 * gaps[12] > 0
    near = sum(gaps[gap] for gap in range(12))
    assert 0.6 < near / gaps.total() < 0.75


def test_rows_share_the_probes_and_name_their_slices():
    probes = ProbeSequences(VOCAB, LENGTH, 8)
    assert [probe.name for probe in probes.probes] == [probe.name for probe in EVERY]
    slices = slices_of(10**9, 0, 128, tuple(probe.name for probe in probes.probes))
    for number in range(8):
        probe, ids = EVERY[number % 6], probes.slices(number, slices)
        window, starts = probes.tokens(number), probes.document_starts(number)
        documents = LENGTH // probe.tokens
        assert window.shape == (LENGTH + 1,) and starts.tolist() == [i * probe.tokens for i in range(documents + 1)]
        asked = ids == slices.of_probe(probe.name)
        assert asked.sum() == documents * (probe.size - (probe.task == "induction"))
        assert (ids[~asked] == NO_SLICE).all()
        for start in starts[:-1]:
            document = window[start : start + probe.tokens]
            for place in np.flatnonzero(asked[start : start + probe.tokens]):
                (before,) = np.flatnonzero(document[:place] == document[place])
                assert document[before + 1] == document[place + 1]


def test_rows_are_the_same_on_every_rank_and_differ_from_each_other():
    one, other = ProbeSequences(VOCAB, LENGTH, 14), ProbeSequences(VOCAB, LENGTH, 14)
    rows = [one.tokens(number).tolist() for number in range(14)]
    assert rows == [other.tokens(number).tolist() for number in range(14)]
    assert len(set(map(tuple, rows))) == 14
    assert one.tokens(3, 10, 20).tolist() == rows[3][10:20]


@pytest.mark.parametrize(
    ("vocab_size", "length", "names"),
    [
        (4096, 256, ["induction/64", "mqar/8", "mqar/32"]),
        (300, 64, ["mqar/8"]),
        (300, 1024, ["induction/64", "mqar/8", "mqar/32"]),
        (20, 1024, []),
        (4096, 63, []),
    ],
)
def test_probes_that_do_not_fit_are_left_out(vocab_size, length, names):
    probes = ProbeSequences(vocab_size, length, 32)
    assert [probe.name for probe in probes.probes] == names
    assert len(probes) == (32 if names else 0)


def test_fewer_rows_than_probes_have_the_first_ones():
    probes = ProbeSequences(VOCAB, LENGTH, 2)
    assert [probe.name for probe in probes.probes] == ["induction/64", "induction/256"] and len(probes) == 2
    assert len(ProbeSequences(VOCAB, LENGTH, 0)) == 0


def test_chance_is_that_of_the_pool():
    assert Probe("induction", 64).chance(2048) == math.log(2048) and Probe("mqar", 8).chance(2048) == math.log(1024)
