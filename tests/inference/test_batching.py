"""Continuous batching: a request gets what it gets alone, whatever else is in the slots."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from based_megatron.convert.huggingface import hf_model
from based_megatron.inference.attention import AttentionLoop
from based_megatron.inference.batching import Batcher, Request
from based_megatron.inference.engine import Engine
from based_megatron.inference.loop import DecodingLoop
from based_megatron.inference.sampling import Sampling
from support.decoding import FULL_ATTENTION, MODEL, engine_of, prompts, weights_of
from support.pool import on_gpu

EOS = 220


def settings(index: int) -> Sampling:
    """Greedy and sampled requests of different lengths, by every setting."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.5},
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 0, "repetition_penalty": 1.2},
        {"min_p": 0.1, "top_p": 0.9},
    ]
    return Sampling(max_new_tokens=1 + index % 9, seed=index, **kinds[index % len(kinds)])


def some_requests(count: int = 20) -> list[Request]:
    return [Request(prompt, settings(i)) for i, prompt in enumerate(prompts(count))]


def texts(batcher: Batcher, requests: Sequence[Request]) -> list[tuple[list[int], str | None]]:
    """Tokens and ends, by request."""
    found: list[tuple[list[int], str | None]] = [([], None) for _ in requests]
    for update in batcher.run(requests):
        tokens, finish = found[update.request]
        assert finish is None, "nothing comes after the end"
        found[update.request] = (tokens + list(update.tokens), update.finish)
    return found


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of()


@pytest.fixture(scope="module")
def one_by_one(engine) -> list[tuple[list[int], str | None]]:
    return [texts(Batcher(engine.loop(1), EOS), [request])[0] for request in some_requests()]


@pytest.mark.parametrize(("slots", "steps"), [(2, 1), (3, 4), (7, 3), (32, 1)])
def test_rounds_of_steps_that_run_ahead_change_nothing(engine, one_by_one, slots, steps):
    """As on a GPU: rounds of steps, the next of which is begun before the tokens of the last are looked at."""
    loop = DecodingLoop(engine, slots)
    loop.steps_a_round, loop.runs_ahead = steps, True
    batcher = Batcher(loop, EOS)
    assert texts(batcher, some_requests()) == one_by_one
    assert batcher.speed.first_tokens == 20 and not batcher.is_busy
    assert batcher.speed.decoded_tokens + 20 >= sum(len(tokens) for tokens, _ in one_by_one)


@pytest.mark.parametrize("slots", [2, 7, 32])
def test_requests_in_slots_get_what_they_get_alone(engine, one_by_one, slots):
    """In fp64, where rounding changes no token."""
    assert texts(Batcher(engine.loop(slots), EOS), some_requests()) == one_by_one
    assert {finish for _, finish in one_by_one} == {"stop", "length"}


def test_the_order_of_the_queue_changes_nothing(engine, one_by_one):
    order = random.Random(0).sample(range(20), 20)
    requests = some_requests()
    found = texts(Batcher(engine.loop(3), EOS), [requests[i] for i in order])
    assert [found[order.index(i)] for i in range(20)] == one_by_one


def logits_of(loop: DecodingLoop, slot: int) -> torch.Tensor:
    return loop.engine.decode_step(loop.token_B.clone(), loop.states.clone())[slot]


def test_a_reproducible_request_has_the_same_bits_in_any_company():
    """In fp32, with as many slots: prompts are read alone, and every step multiplies as many rows."""
    engine = engine_of(torch.float32)
    request = Request(prompts(3)[2], Sampling(max_new_tokens=30, temperature=0.9, seed=5))
    bits = []
    for company in (0, 3, 5):
        batcher = Batcher(engine.loop(6), reproducible=True)
        for other in some_requests(company):
            batcher.add(other)
        number = batcher.add(request)
        for _ in range(12):
            batcher.step()
        slot = next(slot for slot, one in batcher._running.items() if one.number == number)
        bits.append(logits_of(batcher.loop, slot))
    assert torch.equal(bits[0], bits[1]) and torch.equal(bits[0], bits[2])


def test_greedy_tokens_are_those_of_the_export(engine):
    """Ragged batches, against transformers' generate of each prompt alone."""
    model = hf_model(weights_of(), MODEL).double()
    rows = prompts(9)
    found = texts(Batcher(engine.loop(4)), [Request(row, Sampling(max_new_tokens=12, temperature=0)) for row in rows])
    for row, (tokens, _) in zip(rows, found, strict=True):
        ids = torch.tensor([row])
        suppressed = list(range(MODEL.vocab_size, MODEL.embedding_rows))
        output: Any = model.generate(
            ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, suppress_tokens=suppressed
        )
        assert output[0, len(row) :].tolist() == tokens


def test_a_penalty_is_that_of_transformers(engine):
    model = hf_model(weights_of(), MODEL).double()
    row = prompts(3)[1]
    sampling = Sampling(max_new_tokens=20, temperature=0, repetition_penalty=1.4)
    ((found, _),) = texts(Batcher(engine.loop(2)), [Request(row, sampling)])
    output: Any = model.generate(
        torch.tensor([row]),
        max_new_tokens=20,
        do_sample=False,
        repetition_penalty=1.4,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=list(range(MODEL.vocab_size, MODEL.embedding_rows)),
    )
    assert found == output[0, len(row) :].tolist()


def test_a_model_with_full_attention_decodes_one_by_one():
    model = hf_model(weights_of(FULL_ATTENTION), FULL_ATTENTION).double()
    loop = AttentionLoop(model, FULL_ATTENTION.vocab_size)
    requests = some_requests(4)
    found = texts(Batcher(loop, EOS), requests)
    ids = list(requests[0].prompt)
    for _ in range(settings(0).max_new_tokens):
        with torch.no_grad():
            ids.append(int(loop.model(torch.tensor([ids])).logits[0, -1, : FULL_ATTENTION.vocab_size].argmax()))
    assert found[0][0] == ids[len(requests[0].prompt) :]
    assert found == [texts(Batcher(loop, EOS), [request])[0] for request in requests]


@pytest.mark.skipif(on_gpu(), reason="a GPU decodes many steps between two looks at the tokens")
def test_a_freed_slot_is_given_away_at_once(engine):
    """Over 2 slots: a request of 2 tokens, whose slot one of 3 takes, next to one of 6; each first token comes with its prompt."""
    batcher = Batcher(engine.loop(2))
    for row, length in zip(prompts(3), [2, 6, 3], strict=True):
        batcher.add(Request(row, Sampling(max_new_tokens=length, temperature=0)))
    steps: list[list[tuple[int, int]]] = []
    while batcher.is_busy:
        steps.append(sorted((update.request, len(update.tokens)) for update in batcher.step()))
    assert steps == [
        [(0, 1), (0, 1), (1, 1), (1, 1)],
        [(1, 1), (2, 1), (2, 1)],
        [(1, 1), (2, 1)],
        [(1, 1)],
        [(1, 1)],
    ]


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_cancelled_requests_leave_nothing(engine, one_by_one, runs_ahead):
    """Requests that are cancelled while they wait and while they run; the others get what they get alone."""
    loop = DecodingLoop(engine, 3)
    loop.runs_ahead = runs_ahead
    batcher = Batcher(loop, EOS)
    tokens: dict[int, list[int]] = {batcher.add(request): [] for request in some_requests()}
    waiting = {1, 19}
    running = {number for number, (row, _) in enumerate(one_by_one) if len(row) >= 4 and number % 2 == 0}
    assert len(running) >= 3
    for number in waiting:
        batcher.cancel(number)
    after_its_end: list[int] = []
    gone: set[int] = set()
    while batcher.is_busy:
        for update in batcher.step():
            tokens[update.request] += update.tokens
            after_its_end += [update.request] * (update.request in gone)
        for number in running:
            if tokens[number] and number not in gone:
                batcher.cancel(number)
                gone.add(number)
    batcher.cancel(0)
    assert not after_its_end and gone == running and not any(tokens[number] for number in waiting)
    for number in set(tokens) - waiting - running:
        assert tokens[number] == one_by_one[number][0], number


def test_every_new_token_is_told_once_and_the_text_ends_there(engine):
    told: list[int] = []

    def ended(token: int) -> bool:
        told.append(token)
        return len(told) == 3

    (found,) = texts(Batcher(engine.loop(2)), [Request((5, 6), Sampling(max_new_tokens=9, temperature=0), ended)])
    assert found == (told, "stop") and len(told) == 3


def test_requests_are_taken_when_slots_are_free(engine):
    """An endless source is read no further than the slots."""
    taken = 0

    def source() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield Request((taken % 50 + 1,), Sampling(max_new_tokens=4, temperature=0))

    updates = engine.generate(source(), slots=3)
    finished = 0
    while finished < 5:
        finished += next(updates).finish is not None
    assert taken <= 5 + 3


def test_slots_that_were_given_to_another_are_not_used(engine):
    first = Batcher(engine.loop(2))
    first.add(Request((1, 2)))
    Batcher(engine.loop(2))
    with pytest.raises(RuntimeError, match="given to another"):
        first.step()


def test_tokens_of_prompts_and_of_decoding_are_counted_apart(engine):
    batcher = Batcher(engine.loop(2))
    requests = [Request(row, Sampling(max_new_tokens=4, temperature=0)) for row in prompts(5)]
    texts(batcher, requests)
    speed = batcher.speed
    assert speed.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert (speed.first_tokens, speed.decoded_tokens) == (5, 15)
    assert speed.read_seconds > 0 and speed.decode_seconds > 0
