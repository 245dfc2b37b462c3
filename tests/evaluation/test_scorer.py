"""Scores and continuations: those of whole rows in another model's code, whatever is batched, shared or dealt over ranks."""

import random
from typing import Any

import pytest
import torch
from tiny_model import VOCABULARY, attention_scorer, state_scorer

from based_megatron.checkpoint.ranks import ALONE
from based_megatron.errors import ConfigError
from based_megatron.evaluation.ranks import cut_in_batches, deal
from based_megatron.evaluation.scorer import Prompt, Question, Scorer

ROUNDING = 1e-6
"""The rotary tables of the training model are float32."""


def questions() -> list[Question]:
    """Contexts of many lengths, of which some start alike, with one to four continuations."""
    rng = random.Random(0)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, most)))

    start = tokens(1) * 30
    contexts = [(start if i % 3 == 0 else ()) + tokens(50) for i in range(18)]
    return [Question(context, tuple(tokens(9) for _ in range(rng.randint(1, 4)))) for context in contexts]


def prompts() -> list[Prompt]:
    return [Prompt(each.context, 3 + i % 17, lambda row: 7 in row) for i, each in enumerate(questions())]


def answers(scorer: Scorer) -> tuple[list[list[float]], list[list[bool]], list[list[int]]]:
    scores = scorer.log_likelihoods(questions())
    rows = scorer.continuations(prompts())
    numbers = [[score.log_likelihood for score in each] for each in scores]
    return numbers, [[score.is_greedy for score in each] for each in scores], rows


def until_end(rows: list[list[int]]) -> list[list[int]]:
    """What counts: a scorer may go on after the end."""
    return [row[: row.index(7)] if 7 in row else row for row in rows]


def compared() -> dict[str, Any]:
    ours, oracle, one = state_scorer(), attention_scorer(), state_scorer(batch=1)
    found, expected, alone = answers(ours), answers(oracle), answers(one)

    def largest(a: Any, b: Any) -> float:
        pairs = [pair for x, y in zip(a[0], b[0], strict=True) for pair in zip(x, y, strict=True)]
        return max(abs(x - y) for x, y in pairs)

    return {
        "oracle": largest(found, expected),
        "alone": largest(found, alone),
        "greedy": found[1] == expected[1] == alone[1],
        "rows": [until_end(each[2]) for each in (found, expected, alone)],
        "lengths": [(len(row), prompt.new_tokens) for row, prompt in zip(found[2], prompts(), strict=True)],
        "tokens": (ours.computed_tokens, ours.alone_tokens),
    }


@pytest.fixture(scope="module")
def alone(worker_pool):
    """What one rank finds: a process for all."""
    (found,) = worker_pool(1).run(on_one_rank)
    return found


def on_one_rank() -> dict[str, Any]:
    return {"compared": compared(), "dealt": dealt(), "refusals": refusals()}


def test_scores_and_continuations_are_those_of_whole_rows(alone):
    found = alone["compared"]
    assert found["oracle"] < ROUNDING and found["alone"] < ROUNDING and found["greedy"]
    ours, expected, alone = found["rows"]
    assert ours == expected == alone and any(ours)
    assert all(length <= most for length, most in found["lengths"])
    assert any(length == most for length, most in found["lengths"])
    computed, in_requests = found["tokens"]
    assert computed < 0.7 * in_requests, "contexts are read once"


def dealt() -> Any:
    scorer = state_scorer(torch.float32)
    before = scorer.computed_tokens
    return answers(scorer), scorer.computed_tokens - before


def test_ranks_share_the_work_and_all_get_the_same_results(worker_pool, alone):
    expected, all_tokens = alone["dealt"]
    first, second = worker_pool(2).run(dealt)
    assert first[0] == second[0] == expected, "bit for bit"
    assert first[1] + second[1] == all_tokens and min(first[1], second[1]) > 0.2 * all_tokens


def refusals() -> list[str]:
    scorer, messages = attention_scorer(pattern="cLSA"), []
    attempts = (
        lambda: scorer.log_likelihoods([Question((1,) * 120, ((2,) * 10,))]),
        lambda: scorer.continuations([Prompt((1,) * 120, 10, lambda row: False)]),
    )
    for attempt in attempts:
        with pytest.raises(ConfigError) as caught:
            attempt()
        messages.append(str(caught.value))
    scorer.log_likelihoods([Question((1,) * 120, ((2,) * 9,))])
    state_scorer(torch.float32).log_likelihoods([Question((1,) * 500, ((2,) * 10,))])
    return messages


def test_full_attention_refuses_rows_beyond_its_positions(alone):
    first, second = alone["refusals"]
    assert "129 tokens" in first and "130 tokens" in second
    assert all("128 positions" in message and "--context" in message for message in (first, second))


def test_batches_are_as_heavy_as_allowed():
    assert cut_in_batches([1, 1, 1, 1, 1], 2) == [[0, 1], [2, 3], [4]]
    assert cut_in_batches([3, 1, 5, 1, 1], 4) == [[0, 1], [2], [3, 4]]
    assert cut_in_batches([], 4) == []


def test_one_rank_deals_itself_everything():
    assert deal(ALONE, [[2, 0], [1]], lambda batch: [10 * i for i in batch]) == {0: 0, 1: 10, 2: 20}
