"""Rows of any lengths, read without padding: every token once, and states and scores of the row alone."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import VOCABULARY, state_scorer

from based_megatron.evaluation.reader import ScoringReader
from based_megatron.inference.reader import SHARED_TOKENS, common_length, shared_starts, stages
from based_megatron.parallel.sequence.plan import whole_sequence

EXACT = 1e-10


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_stages_read_every_token_once_and_in_order(lengths):
    lengths = sorted(lengths, reverse=True)
    read: list[list[int]] = [[] for _ in lengths]
    found = list(stages(lengths))
    for stage in found:
        for row in range(stage.rows):
            start = lengths[row] - stage.left
            read[row] += range(start, start + stage.tokens)
    assert read == [list(range(length)) for length in lengths]
    assert found[-1].rows == len(lengths) and found[-1].left == found[-1].tokens
    assert len(found) == len(set(lengths)), "a stage for each length, no more"


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=60).map(tuple), min_size=1, max_size=6))
def test_groups_cover_the_rows_and_share_what_is_equal(rows):
    rows = sorted(rows)
    groups = shared_starts(rows)
    assert [group.start for group in groups] == [0, *(group.end for group in groups)][: len(groups)]
    assert groups[-1].end == len(rows)
    for group in groups:
        inside = rows[group.start : group.end]
        assert all(row[: group.tokens] == inside[0][: group.tokens] and len(row) > group.tokens for row in inside)
        assert len(inside) == 1 or group.tokens >= SHARED_TOKENS


def test_common_lengths():
    assert common_length((1, 2, 3), (1, 2, 4)) == 2
    assert common_length((1, 2), (1, 2, 4)) == 2
    assert common_length((3,), (1, 2, 4)) == 0


def some_rows() -> list[tuple[int, ...]]:
    """Two rows that start alike, two that are equally long, one of one token."""
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCABULARY, (count,), generator=generator).tolist())

    start = tokens(30)
    return [tokens(11), start + tokens(9), start + tokens(2), tokens(1), tokens(11)]


def readings(pattern: str) -> dict[str, Any]:
    """Largest errors of last logits and of scores against the training forward, and the tokens computed."""
    scorer = state_scorer(pattern=pattern)
    model, rows = scorer.engine.model, some_rows()

    def forward(row: tuple[int, ...]) -> torch.Tensor:
        tokens = torch.tensor([row])
        with torch.no_grad():
            return model(tokens, whole_sequence(None, len(row), tokens.device)).transpose(0, 1)[0]

    found: dict[str, Any] = {}
    expected = torch.stack([forward(row)[-1] for row in rows])
    for name in ("read", "read_shared"):
        reader = ScoringReader(scorer.engine)
        logits, states = getattr(reader, name)(rows)
        found[name] = float((logits - expected).abs().max())
        found[f"{name} positions"] = states.position_B.tolist()
        found[f"{name} tokens"] = reader.computed_tokens
    continuations = [(5,), rows[0] * 12, (7, 8), rows[1], (9, 10, 11)]
    scores = reader.score(continuations, logits, states)
    again = reader.score(continuations, logits, states)
    errors = []
    for row, continuation, score in zip(rows, continuations, scores, strict=True):
        log_p = forward(row + continuation[:-1])[len(row) - 1 :].log_softmax(-1)
        alone = sum(log_p[i, token].item() for i, token in enumerate(continuation))
        greedy = all(int(log_p[i].argmax()) == token for i, token in enumerate(continuation))
        errors.append(abs(alone - score.log_likelihood))
        assert greedy == score.is_greedy
    best = tuple(forward(rows[0])[-1:].argmax(-1).tolist())
    return found | {
        "scores": max(errors),
        "states kept": scores == again,
        "greedy": reader.score([best], *reader.read(rows[:1]))[0].is_greedy,
    }


def prefix_readings() -> dict[str, Any]:
    """Errors of a model whose tokens all see a prefix of 18, against each row read in one piece and each token after it alone."""
    scorer = state_scorer(prefix_tokens=18)
    model, rows = scorer.engine.model, some_rows()
    continuations = [(5,), rows[0] * 12, (7, 8), rows[1], (9, 10, 11)]

    def alone(row: tuple[int, ...], continuation: tuple[int, ...]) -> tuple[torch.Tensor, float]:
        states = model.zero_states(1)
        with torch.no_grad():
            last = logits = model.decode(torch.tensor([row]), states)
            log_p = 0.0
            for token in continuation:
                log_p += logits.log_softmax(-1)[0, token].item()
                logits = model.decode(torch.tensor([token]), states)
        return last[0], log_p

    expected = [alone(*pair) for pair in zip(rows, continuations, strict=True)]
    found: dict[str, Any] = {}
    for name in ("read", "read_shared"):
        reader = ScoringReader(scorer.engine)
        logits, states = getattr(reader, name)(rows)
        scores = reader.score(continuations, logits, states)
        found[name] = float((logits - torch.stack([last for last, _ in expected])).abs().max())
        found[f"{name} scores"] = max(abs(s.log_likelihood - e) for s, (_, e) in zip(scores, expected, strict=True))
    reader = ScoringReader(scorer.engine)
    logits, _ = reader.read_shared(rows[1:3])
    found["shared start"] = float((logits - torch.stack([last for last, _ in expected[1:3]])).abs().max())
    assert reader.computed_tokens == len(rows[1]) + len(rows[2]) - 30, "the start is longer than the prefix"
    found["row of the start alone"] = float((alone(rows[1][:18], (3,))[0] - alone(rows[1], (3,))[0]).abs().max())
    return found


def test_a_prefix_is_read_at_once_and_is_that_of_its_row(worker_pool):
    """Rows shorter than the prefix, as long, and longer; some share it."""
    (found,) = worker_pool(1).run(prefix_readings)
    assert found.pop("row of the start alone") > 1e-3
    assert all(error < EXACT for error in found.values()), found


@pytest.mark.parametrize("pattern", ["cLSc", "RDE"])
def test_rows_are_read_and_scored_as_alone(worker_pool, pattern):
    """The mixers of Based, and of other architectures with states of constant size."""
    (found,) = worker_pool(1).run(readings, pattern)
    lengths = [len(row) for row in some_rows()]
    assert found["read"] < EXACT and found["read_shared"] < EXACT and found["scores"] < EXACT
    assert found["read positions"] == found["read_shared positions"] == lengths
    assert found["states kept"] and found["greedy"]
    assert found["read tokens"] == sum(lengths)
    assert found["read_shared tokens"] == sum(lengths) - 30, "the common start is read once"
    assert len(set(lengths)) < len(lengths) and all(a != b for a, b in pairwise(lengths))
