"""Samples under every layout are the likeliest tokens of the single model."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from based_megatron.config import MonitorConfig, ParallelConfig
from based_megatron.model.build import build_model
from based_megatron.parallel.sequence.plan import whole_sequence
from based_megatron.parallel.topology import build_topology
from based_megatron.train.callbacks import sampler
from based_megatron.train.callbacks.sampler import Sampler, continuation, next_token, whole_model
from support.layouts import SEQUENCE_TOKENS, VOCAB, build_run, small_config
from support.pool import rank_device

# Around the boundary of two context slices of 16, and at both ends of the sequence.
LENGTHS = [1, 15, 16, 17, SEQUENCE_TOKENS - 1]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def expected_tokens(**model: Any) -> list[int]:
    """The argmax after each prompt, of a forward pass over the prompt alone."""
    config = small_config(model=model)
    topology = build_topology(config.parallel, rank_device(0))
    (model,) = build_model(config, topology)
    found = []
    for ids in prompts():
        plan = whole_sequence(None, len(ids), topology.device)
        with torch.no_grad():
            logits = model(torch.tensor([ids], device=topology.device), plan)
        found.append(int(logits[-1, 0, :VOCAB].argmax()))
    return found


def sampled_tokens(parallel: ParallelConfig, **model: Any) -> list[int]:
    run = build_run(small_config(parallel, model=model))
    trainer: Any = SimpleNamespace(config=run.config, topology=run.topology, step_runner=run.step)
    return [next_token(trainer, ids) for ids in prompts()]


@pytest.fixture(scope="module")
def expected(worker_pool) -> list[int]:
    """The tokens of a single process."""
    (tokens,) = worker_pool(1).run(expected_tokens)
    assert len(set(tokens)) > 2
    return tokens


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(tensor=2),
        ParallelConfig(context=2),
        ParallelConfig(pipeline=2),
        ParallelConfig(pipeline=2, virtual_pipeline=2),
        ParallelConfig(zero_stage=3),
    ],
)
def test_the_next_token_is_that_of_the_whole_model(worker_pool, expected, parallel):
    assert worker_pool(2).run(sampled_tokens, parallel) == [expected, expected]


def test_a_prefix_ends_with_the_prompt(worker_pool):
    """Prompts shorter and longer than the prefix that all tokens see; the padding behind them is not seen."""
    (expected,) = worker_pool(1).run(expected_tokens, prefix_tokens=20)
    assert worker_pool(2).run(sampled_tokens, ParallelConfig(pipeline=2), prefix_tokens=20) == [expected, expected]


def continued(parallel: ParallelConfig, **model: Any) -> tuple[list[list[int]], list[list[int]], bool]:
    """Continuations of 6 tokens, by repeated whole forward passes too, and whether the engine made them."""
    run = build_run(small_config(parallel, model=model))
    trainer: Any = SimpleNamespace(config=run.config, topology=run.topology, step_runner=run.step)
    expected = []
    for ids in prompts()[:-1]:
        row = list(ids)
        for _ in range(6):
            row.append(next_token(trainer, row))
        expected.append(row[len(ids) :])
    found = [continuation(trainer, ids, 6) for ids in prompts()[:-1]]
    return found, expected, whole_model(trainer) is not None


@pytest.mark.parametrize(
    ("parallel", "pattern", "by_engine"),
    [
        (ParallelConfig(), "cLSc", True),
        (ParallelConfig(context=2), "cLSc", True),
        (ParallelConfig(), "cLSA", False),
        (ParallelConfig(tensor=2), "cLSc", False),
        (ParallelConfig(zero_stage=3), "cLSc", False),
    ],
)
def test_the_engine_continues_as_whole_forward_passes_do(worker_pool, parallel, pattern, by_engine):
    for found, expected, was_engine in worker_pool(2).run(continued, parallel, layer_pattern=pattern):
        assert found == expected and was_engine == by_engine


def token_beside_a_loud_row() -> tuple[int, int]:
    """The next token when a row of the vocabulary's padding has the largest logit of all."""
    config = small_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_multiple=8))
    run = build_run(config)
    trainer: Any = SimpleNamespace(config=run.config, topology=run.topology, step_runner=run.step)
    before = next_token(trainer, prompts()[2])
    weight = run.step.chunks[0].embedding.weight
    weight.data[95] = 100 * weight.data[before]
    return before, next_token(trainer, prompts()[2])


def test_rows_that_are_no_token_are_never_sampled(worker_pool):
    ((before, after),) = worker_pool(1).run(token_beside_a_loud_row)
    assert before == after < VOCAB


class Letters:
    """A tokenizer of letters."""

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        return SimpleNamespace(ids=[ord(letter) for letter in text])

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Recorder:
    """A trainer that keeps what it is told."""

    def __init__(self, length: int = 20, **monitor: Any) -> None:
        config = small_config()
        self.config = dataclasses.replace(
            config,
            monitor=MonitorConfig(**monitor),
            data=dataclasses.replace(config.data, sequence_length_tokens=length),
        )
        self.samples: list[tuple[str, str]] = []

    def doing(self, phase: str) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, name: str, *, prompt: str, text: str) -> None:
        assert name == "sample"
        self.samples.append((prompt, text))


@pytest.fixture
def alphabet(monkeypatch):
    """The next tokens are the next letters."""
    monkeypatch.setattr(
        sampler, "continuation", lambda trainer, ids, tokens: [ids[-1] + 1 + place for place in range(tokens)]
    )


def samples(trainer: Recorder, step: int) -> list[tuple[str, str]]:
    Sampler(Letters()).post_step(trainer, SimpleNamespace(step=step))  # type: ignore[arg-type]
    return trainer.samples


def test_prompts_are_continued_by_so_many_tokens(alphabet):
    trainer = Recorder(sample_interval_steps=5, sample_prompts=("a", "xa"), sample_tokens=3)
    assert samples(trainer, 10) == [("a", "bcd"), ("xa", "bcd")]


def test_nothing_is_sampled_between_intervals(alphabet):
    assert samples(Recorder(sample_interval_steps=5), 9) == []


def test_a_sample_ends_with_the_sequence(alphabet):
    trainer = Recorder(length=4, sample_interval_steps=1, sample_prompts=("ab", "abcdefgh"), sample_tokens=9)
    assert samples(trainer, 1) == [("ab", "cd"), ("abcdefgh", "d")]


def test_an_empty_prompt_starts_from_token_0(alphabet):
    trainer = Recorder(sample_interval_steps=1, sample_prompts=("",), sample_tokens=2)
    assert samples(trainer, 1) == [("", "\x01\x02")]
