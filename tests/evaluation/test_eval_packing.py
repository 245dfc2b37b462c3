"""Scores out of packed sequences: those of each row alone, for as many tokens as the rows have."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import VOCABULARY, attention_scorer, state_scorer

from based_megatron.evaluation.packing import PACKED_TOKENS, PackedReader, Pair, packed
from based_megatron.evaluation.scorer import Question, is_packed

ROUNDING = 1e-6
"""The rotary tables of the training model are float32."""
SEQUENCE_TOKENS = 40


@given(st.lists(st.integers(1, 30), max_size=12))
def test_every_document_is_in_one_sequence_with_room_for_it(lengths):
    sequences = packed(lengths, 30)
    assert sorted(index for sequence in sequences for index in sequence) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in sequence) for sequence in sequences]
    assert all(total <= 30 for total in totals)
    assert sum(total <= 15 for total in totals) <= 1, "two half empty sequences would be one"


def pairs() -> list[Pair]:
    """Contexts and continuations of many lengths, some of one token; one pair fills a sequence alone."""
    rng = random.Random(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(count))

    sizes = [(1, 1), (30, 11), (1, 9), (12, 1), *((rng.randint(1, 25), rng.randint(1, 9)) for _ in range(14))]
    return [Pair(tokens(context), tokens(continuation)) for context, continuation in sizes]


def scored(pattern: str) -> dict[str, Any]:
    scorer, rows = state_scorer(pattern=pattern), pairs()
    reader = PackedReader(scorer.engine.model, SEQUENCE_TOKENS)
    found = reader.score(rows)
    tokens = reader.computed_tokens
    alone = [reader.score([row])[0] for row in rows]
    contexts = [Question(row.context, (row.continuation,)) for row in rows]
    states = [score for (score,) in scorer._score_states(contexts)]
    best = [Pair(rows[0].context, (token,)) for token in range(VOCABULARY)]
    return {
        "found": found,
        "alone": alone,
        "states": states,
        "tokens": tokens,
        "greedy": sum(score.is_greedy for score in reader.score(best)),
        "oracle": [score for (score,) in attention_scorer().log_likelihoods(contexts)] if pattern == "cLSc" else states,
    }


@pytest.mark.parametrize("pattern", ["cLSc", "RDE"])
def test_packed_rows_are_scored_as_alone(worker_pool, pattern):
    (found,) = worker_pool(1).run(scored, pattern)
    for name in ("alone", "states", "oracle"):
        for ours, theirs in zip(found["found"], found[name], strict=True):
            assert ours.log_likelihood == pytest.approx(theirs.log_likelihood, abs=ROUNDING), name
            assert ours.is_greedy == theirs.is_greedy
    assert found["tokens"] == sum(len(row.context) + len(row.continuation) - 1 for row in pairs()), "no padding"
    assert found["greedy"] == 1, "one of all tokens is the likeliest"


def test_questions_are_packed_where_they_share_little():
    """Tokens alone and with states: 24 of 24, 47 of 27, 15 of 10, 16 of 10, 72 of 40, 48 of 40."""
    one, two = Question((1,) * 20, ((2,) * 5,)), Question((1,) * 20, ((2,) * 5, (3,) * 4))
    short, shorter = Question((1,) * 5, ((2,) * 4, (2,) * 3)), Question((1,) * 6, ((2,) * 3, (2,) * 3))
    assert is_packed([one], 19) and not is_packed([two], 19)
    assert is_packed([short], 4) and not is_packed([shorter], 5)
    assert not is_packed([one] * 3, 16) and is_packed([one] * 2, 8)
    whole = Question((1,) * (PACKED_TOKENS - 1), ((2, 3),))
    assert is_packed([whole], 19) and not is_packed([Question((1, *whole.context), whole.continuations)], 19)
