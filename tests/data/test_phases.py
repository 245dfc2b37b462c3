"""The order of mixtures whose weights change and whose sources run out, against an oracle that goes from sequence to sequence."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_corpora import numbered_documents, write_corpus

from based_megatron.config.schema import DataConfig, SourceConfig
from based_megatron.data.fingerprints import corpora_before, corpora_text
from based_megatron.data.loader import Loader
from based_megatron.data.mixture import Mixture
from based_megatron.data.order import Permutation
from based_megatron.data.phases import ENDLESS, Phases
from based_megatron.data.sources import PlannedSource, Sources
from based_megatron.errors import ConfigError, DataError

S, SEED = 8, 5
SIZES = (5, 9, 14)
"""Sequences of the corpora a, b and c."""

# Sums of up to 12 divide the period of a mixture, so that whole weights are met exactly.
weights_strategy = st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any)
schedules = st.lists(st.tuples(st.integers(1, 60), weights_strategy), max_size=3, unique_by=lambda entry: entry[0])
limits_strategy = st.lists(st.none() | st.integers(1, 30), min_size=3, max_size=3)


def one_by_one(changes: Sequence[tuple[int, Sequence[int]]], limits: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """(source, number in its stream) of each sequence, until no source is left: the oracle."""
    number, taken = 0, [0] * len(limits)
    turn, takes_part = list(taken), [True] * len(limits)

    def begin_anew() -> None:
        turn[:] = [0] * len(limits)
        takes_part[:] = [limit is None or count < limit for limit, count in zip(limits, taken, strict=True)]

    while True:
        weights = [weights for start, weights in changes if start <= number][-1]
        if number in [start for start, _ in changes]:
            begin_anew()
        due = _due(turn, weights, takes_part)
        if due is not None and taken[due] == limits[due]:
            begin_anew()
            due = _due(turn, weights, takes_part)
        if due is None:
            return
        yield due, taken[due]
        taken[due], turn[due], number = taken[due] + 1, turn[due] + 1, number + 1


def _due(turn: list[int], weights: Sequence[int], takes_part: list[bool]) -> int | None:
    """The source whose next turn comes first; the first of those that are due at once."""
    times = [
        ((turn[source] + 0.5) / weights[source], source)
        for source in range(len(weights))
        if weights[source] and takes_part[source]
    ]
    return min(times)[1] if times else None


def first_of(oracle: Iterator[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    return [entry for entry, _ in zip(oracle, range(count), strict=False)]


def located(phases: Phases, count: int) -> list[tuple[int, int]]:
    sources, own = phases.locate(np.arange(min(count, phases.end)))
    return list(zip(sources.tolist(), own.tolist(), strict=True))


@settings(max_examples=40, deadline=None)
@given(first=weights_strategy, schedule=schedules, limits=limits_strategy)
def test_the_order_is_that_of_the_oracle(first, schedule, limits):
    changes = [(0, first), *sorted(schedule)]
    phases, expected = Phases(changes, limits), first_of(one_by_one(changes, limits), 120)
    assert located(phases, 120) == expected and (phases.end == len(expected) or len(expected) == 120)
    for number in (0, len(expected) // 2, len(expected)):
        counts = [sum(source == place for source, _ in expected[:number]) for place in range(3)]
        assert phases.taken(number).tolist() == counts
    if phases.end < ENDLESS:
        with pytest.raises(DataError, match=f"sequence {phases.end} is after the last of the data.*max_epochs"):
            phases.locate(np.array([0, phases.end]))


@settings(max_examples=15, deadline=None)
@given(first=weights_strategy, later=weights_strategy, start=st.integers(1, 3 * 10**12))
def test_a_source_goes_on_where_it_was_after_any_number_of_sequences(first, later, start):
    phases = Phases([(0, first), (start, later)], [None] * 3)
    numbers = np.arange(max(0, start - 500), start + 500)
    sources, own = phases.locate(numbers)
    taken = phases.taken(int(numbers[0]))
    for source in range(3):
        mine = own[sources == source]
        assert mine.tolist() == list(range(int(taken[source]), int(taken[source]) + len(mine)))


@settings(max_examples=12, deadline=None)
@given(first=weights_strategy, schedule=schedules, limits=limits_strategy)
def test_the_sequence_of_the_run_that_is_a_sources_own_is_found(first, schedule, limits):
    phases = Phases([(0, first), *sorted(schedule)], limits)
    order = located(phases, 90)
    for source in range(3):
        for own in range(12):
            expected = order.index((source, own)) if (source, own) in order else None
            found = phases.number(source, own)
            assert found == expected or (expected is None and len(order) == 90 and found is not None and found >= 90)


@pytest.mark.parametrize("carried", [False, True])
def test_the_numbers_of_a_sequence_are_those_that_lead_to_it(corpora, carried):
    data = mixture(corpora, (2, 1, 0), [(30, (1, 1, 1)), (70, (0, 0, 1))], (0, 1.5, 0))
    if carried:
        data = DataConfig(path=corpora[2], carry_state=True, sequence_length_tokens=S)
    sources = Sources(data, 4)
    order = sources.locate(np.arange(100))
    for source, reader in enumerate(sources.train):
        for sequence in range(len(reader)):
            expected = [number for number, place in enumerate(order) if place == (source, sequence)]
            assert list(sources.numbers_of(source, sequence, 100)) == expected


def test_a_used_up_source_leaves_the_others_in_their_proportions():
    phases = Phases([(0, [2, 1, 1])], [10, None, None])
    sources, _ = phases.locate(np.arange(20, 420))
    assert np.bincount(sources).tolist() == [0, 200, 200]
    assert phases.used_up() == [20, None, None] and phases.shares == [(0, (2, 1, 1)), (20, (0, 1, 1))]


def test_what_is_used_up_at_the_end_is_said():
    phases = Phases([(0, [1, 1, 0])], [3, 5, None])
    assert phases.end == 8 and phases.used_up() == [6, 8, None]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[str]:
    """Corpora of SIZES sequences, whose tokens are all different."""
    folder = tmp_path_factory.mktemp("mixed")
    for place, size in enumerate(SIZES):
        documents = numbered_documents([size * S + 2], 1 + 1000 * place)
        write_corpus(folder / "abc"[place], documents, documents, block_tokens=32)
    return [str(folder / name) for name in "abc"]


def mixture(
    corpora: Sequence[str], first: Sequence[float], schedule=(), epochs: Sequence[float] = (0, 0, 0)
) -> DataConfig:
    sources = tuple(SourceConfig(*entry) for entry in zip(corpora, map(float, first), epochs, strict=True))
    words = tuple(f"{start * S}={','.join(map(str, weights))}" for start, weights in schedule)
    return DataConfig(sources=sources, schedule=words, sequence_length_tokens=S, seed=SEED, num_workers=0)


@settings(max_examples=25, deadline=None)
@given(
    first=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    schedule=schedules,
    epochs=st.lists(st.sampled_from([0, 0, 0.5, 1, 2.25]), min_size=3, max_size=3),
    layouts=st.lists(st.sampled_from([(1, 1), (2, 1), (1, 3), (4, 1), (2, 3)]), min_size=2, max_size=3),
)
def test_every_layout_reads_what_the_oracle_says(corpora, first, schedule, epochs, layouts):
    """The tokens of all steps, under data parallel ranks and micro batches that change from step to step."""
    batch, steps = 12, 6
    changes = [(0, first), *sorted(schedule)]
    limits = [math.floor(count * size) if count else None for count, size in zip(epochs, SIZES, strict=True)]
    data = mixture(corpora, first, sorted(schedule), epochs)
    sources = Sources(data)
    orders = [{} for _ in SIZES]
    expected = []
    for source, number in first_of(one_by_one(changes, limits), batch * steps):
        epoch, place = divmod(number, SIZES[source])
        if epoch not in orders[source]:
            key = f"{SEED}/{sources.manifests[source].fingerprint}/{epoch}"
            orders[source][epoch] = Permutation(SIZES[source], key)(np.arange(SIZES[source])).tolist()
        begin = 1 + 1000 * source + orders[source][epoch][place] * S
        expected.append(list(range(begin, begin + S)))
    for step in range(len(expected) // batch):
        dp, micro = layouts[step % len(layouts)]
        ranks = [Loader(sources, data, batch, micro, rank, dp).micro_batches(step) for rank in range(dp)]
        rows = [row for turn in zip(*ranks, strict=True) for found in turn for row in found.tokens_BL.tolist()]
        assert rows == expected[step * batch : (step + 1) * batch]


def test_the_plan_counts_tokens_and_epochs(corpora):
    sources = Sources(mixture(corpora, (1, 1, 0), [(20, (0, 0, 1))], (1, 0, 0)))
    assert sources.plan(27) == [
        PlannedSource("a", 5 * S, 1.0, 10 * S),
        PlannedSource("b", 15 * S, 15 / 9, None),
        PlannedSource("c", 7 * S, 0.5, None),
    ]
    assert [planned.used_up_tokens for planned in sources.plan(9)] == [None] * 3
    lines = [
        "a: 40 tokens, 1 epochs, used up after 80 tokens of the run",
        "b: 120 tokens, 1.67 epochs",
        "c: 56 tokens, 0.5 epochs",
    ]
    assert [str(planned) for planned in sources.plan(27)] == lines
    sources.check_enough(10**9)


def test_a_run_that_needs_more_than_the_epochs_is_refused(corpora):
    sources = Sources(mixture(corpora[:2], (1, 1), (), (2, 2)))
    sources.check_enough(28)
    with pytest.raises(
        DataError, match=r"reads 232 tokens, but with max_epochs data.sources have 224: lower train.steps"
    ):
        sources.check_enough(29)
    with pytest.raises(ConfigError, match=r"data.sources\[1\].max_epochs 0.1 of 9 sequences is none"):
        Sources(mixture(corpora[:2], (1, 1), (), (0, 0.1)))


def test_a_corpus_that_is_there_twice_is_refused(corpora):
    with pytest.raises(
        DataError, match=r"data.sources\[0\] .*/a and data.sources\[2\] .*/a are the same corpus"
    ) as error:
        Sources(mixture([corpora[0], corpora[1], corpora[0]], (1, 1, 1)))
    assert "\n" not in str(error.value)


def test_the_fingerprint_knows_shares_and_phases(corpora):
    a, b, c = (manifest.fingerprint for manifest in Sources(mixture(corpora, (1, 1, 1))).manifests)
    rest = f"/seed={SEED}/cross_blocks/sequence_length_tokens={S}"

    def text(first, schedule=(), epochs=(0, 0, 0)) -> str:
        return Sources(mixture(corpora, first, schedule, epochs)).fingerprint

    assert text((2, 2, 2)) == f"{a}*1+{b}*1+{c}*1{rest}"
    assert text((0.5, 0.25, 0.25), [(9, (0, 0, 3))]) == f"{a}*2+{b}*1+{c}*1@9={c}*1{rest}"
    assert text((1, 1, 0), [(9, (0, 0, 3))], (0.4, 0, 0)) == f"{a}*1+{b}*1@4={b}*1@9={c}*1{rest}"
    # Weights that %g could not tell apart.
    assert text((0.30001234, 0.3, 0.4)) != text((0.30004, 0.3, 0.4))


def test_only_the_past_of_a_fingerprint_counts():
    a, b = "a" * 32, "b" * 32
    text = f"{a}*2+{b}*1@100={b}*1@200={a}*1/seed=1"
    assert corpora_before(text, 100) == f"{a}*2+{b}*1"
    assert corpora_before(text, 101) == f"{a}*2+{b}*1@100={b}*1"
    assert corpora_before(text, 201) == text.partition("/")[0]
    # Older ones have weights of six digits, and the saved settings have all of them.
    assert corpora_before(f"{a}*1e+06+{b}*500000/seed=1", 7) == f"{a}*2+{b}*1"
    weights = (0.123456789, 0.876543211)
    now = corpora_text([a, b], [(0, Mixture(weights).shares)])
    assert corpora_before(f"{a}*0.123457+{b}*0.876543/seed=1", 7, weights) == corpora_before(now, 7) == now
    assert corpora_before("anything", 7) == "anything"
