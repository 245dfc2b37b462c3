"""The choice of the next token: distributions by brute force, draws by the seed alone."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from based_megatron.inference.choice import Choice, Work, stream_of
from based_megatron.inference.sampling import Sampling

VOCABULARY = 11
PADDED = 16


def some_logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    """The padding columns have the largest of all."""
    logits = 2 * torch.randn(rows, PADDED, generator=torch.Generator().manual_seed(seed))
    logits[:, VOCABULARY:] = 100
    return logits


def expected_distribution(logits: np.ndarray, sampling: Sampling, seen: set[int]) -> np.ndarray:
    """Probabilities by loops over tokens, in the order of the settings of transformers."""
    scores = [
        (x / sampling.repetition_penalty if x > 0 else x * sampling.repetition_penalty) if i in seen else x
        for i, x in enumerate(logits[:VOCABULARY])
    ]
    scores = [x / sampling.temperature for x in scores]
    order = sorted(range(VOCABULARY), key=lambda i: -scores[i])
    kept = order[: sampling.top_k or VOCABULARY]
    total = sum(np.exp(scores[i]) for i in kept)
    chosen, mass = [], 0.0
    for i in kept:
        if mass < sampling.top_p:
            chosen.append(i)
        mass += np.exp(scores[i]) / total
    chosen = [i for i in chosen if np.exp(scores[i] - scores[order[0]]) >= sampling.min_p]
    p = np.array([np.exp(scores[i]) if i in chosen else 0.0 for i in range(VOCABULARY)])
    return p / p.sum()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"repetition_penalty": 2.0},
        {"temperature": 1.7, "top_k": 8, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.5},
    ],
)
def test_tokens_have_the_probabilities_of_the_settings(changes: dict[str, Any]):
    """A fine grid of draws meets each token as often as its probability says."""
    sampling, seen = Sampling(**changes), {0, 3, 4}
    draws = 4000
    choice = Choice(draws, VOCABULARY, torch.device("cpu"), "reference")
    for row in range(draws):
        choice.set_row(row, sampling, sorted(seen))
    logits, token_B = some_logits(), torch.zeros(draws, dtype=torch.int64)
    uniform_B = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    choice.choose(logits.expand(draws, -1), uniform_B, token_B, Work.of([sampling]))
    found = np.bincount(token_B.numpy(), minlength=VOCABULARY) / draws
    expected = expected_distribution(logits[0].double().numpy(), sampling, seen)
    assert np.abs(found - expected).max() < 2 / draws
    assert (found[expected == 0] == 0).all()


def test_both_ends_of_the_draws_are_tokens_that_may_be():
    choice = Choice(2, VOCABULARY, torch.device("cpu"), "reference")
    for row in range(2):
        choice.set_row(row, Sampling(top_k=2), [1])
    logits = torch.full((2, PADDED), -5.0)
    logits[:, [4, 6]] = 1.0
    token_B = torch.zeros(2, dtype=torch.int64)
    choice.choose(logits, torch.tensor([0.0, 1 - 2**-53]), token_B, Work(samples=True, truncates=True))
    assert token_B.tolist() == [4, 6]


def test_the_work_for_others_changes_no_row():
    """Rows are chosen as with the least work that they need, where others are sorted for and penalised."""
    kinds = [
        Sampling(temperature=0),
        Sampling(),
        Sampling(min_p=0.1),
        Sampling(top_k=2),
        Sampling(repetition_penalty=1.3),
    ]
    logits, uniform_B = some_logits(len(kinds)), torch.rand(len(kinds), dtype=torch.float64)
    choice = Choice(len(kinds), VOCABULARY, torch.device("cpu"), "reference")
    for row, sampling in enumerate(kinds):
        choice.set_row(row, sampling, [1, 2])
    alone = torch.zeros(len(kinds), dtype=torch.int64)
    for row, sampling in enumerate(kinds):
        one, here = choice.rows(torch.tensor([row])), slice(row, row + 1)
        one.choose(logits[here], uniform_B[here], alone[here], Work.of([sampling]))
    together = torch.zeros(len(kinds), dtype=torch.int64)
    choice.choose(logits, uniform_B, together, Work.of(kinds))
    assert torch.equal(alone, together)


def test_a_row_forgets_the_request_before():
    choice = Choice(1, VOCABULARY, torch.device("cpu"), "reference")
    choice.set_row(0, Sampling(repetition_penalty=9.0), list(range(VOCABULARY)))
    choice.set_row(0, Sampling(temperature=0, repetition_penalty=2.0), [3])
    assert choice.seen()[0].nonzero().flatten().tolist() == [3]
    assert choice.is_greedy_B.tolist() == [True] and choice.penalty_B.tolist() == [2.0]


def test_tokens_of_the_text_are_penalised_too():
    choice = Choice(1, VOCABULARY, torch.device("cpu"), "reference")
    sampling = Sampling(temperature=0, repetition_penalty=1e6)
    choice.set_row(0, sampling, [1])
    logits, found = some_logits(), []
    for _ in range(4):
        token_B = torch.zeros(1, dtype=torch.int64)
        choice.choose(logits, torch.zeros(1, dtype=torch.float64), token_B, Work.of([sampling]))
        found.append(int(token_B))
    assert len(set(found)) == 4 and 1 not in found


def test_what_is_drawn_depends_on_the_seed_alone():
    one, again, other = stream_of(2**63 - 1), stream_of(2**63 - 1), stream_of(0)
    assert [*one.random(3), *one.random(5)] == list(again.random(8))
    assert other.random() != again.random()


@pytest.mark.parametrize("logit", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_harm_no_other_row(logit):
    choice = Choice(2, VOCABULARY, torch.device("cpu"), "reference")
    for row in range(2):
        choice.set_row(row, Sampling(top_p=0.5, seed=row), [1])
    logits = some_logits(2)
    expected, token_B = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    uniform_B = torch.tensor([0.3, 0.6], dtype=torch.float64)
    choice.choose(logits, uniform_B, expected, Work(True, True))
    logits[0, 2] = logit
    choice.choose(logits, uniform_B, token_B, Work(True, True))
    assert token_B[1] == expected[1] and 0 <= token_B[0] < VOCABULARY


def test_work_is_what_the_requests_need():
    assert Work.of([Sampling(temperature=0, top_k=3)]) == Work()
    assert Work.of([Sampling(), Sampling(temperature=0)]) == Work(samples=True)
    assert Work.of([Sampling(top_p=0.5)]) == Work(samples=True, truncates=True)
    assert Work.of([dataclasses.replace(Sampling(temperature=0), repetition_penalty=1.1)]) == Work(penalises=True)
