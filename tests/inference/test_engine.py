"""Prefill and decoding equal the full forward, however a sequence is split and whatever else is in the batch."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from based_megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig
from based_megatron.convert.layout import our_shapes
from based_megatron.errors import ConfigError
from based_megatron.inference.batching import Request
from based_megatron.inference.engine import Engine, PromptGraph
from based_megatron.inference.loop import LONG_RUN_STEPS, STEPS_A_REPLAY
from based_megatron.inference.sampling import Sampling
from based_megatron.inference.source import training_model
from based_megatron.model.based_model import BasedModel
from based_megatron.model.build import build_model
from based_megatron.parallel.sequence.plan import whole_sequence
from support.layouts import topology_of
from support.pool import rank_device

DOUBLE = torch.float64
MODEL = ModelConfig(
    layer_pattern="cLSc LS",
    hidden_size=32,
    ffn_hidden_size=48,
    num_heads=4,
    feature_dim=4,
    window_left=5,
    conv_kernel=3,
    rotary_fraction=0.5,
    vocab_size=91,
    vocab_multiple=8,
    init_std=0.3,
)
TOKENS = 14
NEW_TOKENS = STEPS_A_REPLAY + 5
"""One from the prompt; on a GPU, a replay of many steps and some single ones."""


def build(dtype: torch.dtype = DOUBLE, backend: Any = "reference", **model: Any) -> tuple[BasedModel, Any]:
    config = Config(model=dataclasses.replace(MODEL, **model), train=TrainConfig(backend=backend))
    topology = topology_of()
    return build_model(config, topology, dtype)[0].eval(), topology


def some_tokens(batch: int = 3, tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, 91, (batch, tokens), generator=torch.Generator().manual_seed(5)).to(rank_device(0))


@torch.no_grad()
def full_logits(model: BasedModel, topology: Any, tokens: Tensor) -> Tensor:
    """[B, L, V] of the training forward."""
    plan = whole_sequence(None, tokens.shape[1], topology.device)
    return model(tokens, plan).transpose(0, 1)


def decoded_logits(engine: Engine, tokens: Tensor, prompt: int) -> Tensor:
    """Logits [B, L - prompt + 1, U] from the last prompt token on."""
    logits, states = engine.prefill(tokens[:, :prompt])
    found = [logits, *(engine.decode_step(tokens[:, t], states) for t in range(prompt, tokens.shape[1]))]
    assert states.position_B.tolist() == [tokens.shape[1]] * len(tokens)
    return torch.stack(found, dim=1)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def split_errors(
    dtype: torch.dtype, backend: str, prompts: list[int], pieces: list[int | None], batch: int = 3, **model: Any
) -> Any:
    """{(prompt tokens, longest piece): largest relative error}."""
    built, topology = build(dtype, backend, **model)
    tokens = some_tokens(batch)
    expected = full_logits(built, topology, tokens)
    return {
        (prompt, piece): error(decoded_logits(Engine(built, piece), tokens, prompt), expected[:, prompt - 1 :])
        for prompt in prompts
        for piece in pieces
    }


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"conv_kernel": 4, "window_left": 1, "tie_embeddings": False},
        {"conv_kernel": 1, "window_left": 0},
        {"feature_map": "rebased"},
    ],
)
def test_every_split_equals_the_full_forward(worker_pool, model):
    """Prompts come in pieces, shorter and longer than the window and the convolution."""
    prompts = list(range(1, TOKENS + 1))
    (errors,) = worker_pool(1).run(split_errors, DOUBLE, "reference", prompts, [None, 1, 2, 4, 7], **model)
    assert {case: value for case, value in errors.items() if not value < 1e-10} == {}


def test_splits_in_single_precision(worker_pool):
    (errors,) = worker_pool(1).run(split_errors, torch.float32, "reference", [1, 6, TOKENS], [None, 4])
    assert all(error < 1e-5 for error in errors.values())


def test_splits_with_the_kernels(worker_pool):
    """A prompt of one token, and longer than the window, at once and in pieces."""
    for prompts, pieces in (([1], [None]), ([9], [None, 4])):
        run = functools.partial(split_errors, torch.float32, "triton", batch=2, layer_pattern="cLS")
        (errors,) = worker_pool(1).run(run, prompts, pieces)
        assert len(errors) == len(pieces) and all(error < 1e-5 for error in errors.values())


@pytest.mark.parametrize("feature_map", ["taylor", "rebased"])
def test_a_prompt_with_a_prefix_continues_as_the_full_forward(worker_pool, feature_map):
    """The prefix is of 5 tokens: the first piece must hold them."""
    model = {"prefix_tokens": 5, "feature_map": feature_map}
    (errors,) = worker_pool(1).run(split_errors, DOUBLE, "reference", [5, 6, TOKENS], [None, 5], **model)
    assert all(error < 1e-10 for error in errors.values())


def test_splits_of_squares_with_the_kernels(worker_pool):
    run = functools.partial(split_errors, torch.float32, "triton", batch=2, layer_pattern="L", feature_map="rebased")
    (errors,) = worker_pool(1).run(run, [9], [4])
    assert errors[9, 4] < 1e-4  # a normaliser of squares may be small


def batch_changes() -> dict[str, float]:
    """Largest changes of the logits of row 1, in single precision, when the other rows of the batch change.

    A batch of another size may be multiplied in another order.
    """
    model, _ = build(torch.float32)
    engine, tokens = Engine(model), some_tokens()
    together = decoded_logits(engine, tokens, 6)[1:2]
    others = tokens.clone()
    others[[0, 2]] = 90 - others[[0, 2]]
    changes = {"alone": tokens[1:2], "elsewhere": tokens[[1, 0, 2]], "beside others": others}
    rows = {"alone": 0, "elsewhere": 0, "beside others": 1}
    return {
        name: error(decoded_logits(engine, batch, 6)[rows[name]][None], together) for name, batch in changes.items()
    }


def test_the_batch_never_changes_a_row(worker_pool):
    (changes,) = worker_pool(1).run(batch_changes)
    assert changes["beside others"] == 0 and changes["elsewhere"] == 0 and changes["alone"] < 1e-5


def rows_at_different_positions() -> float:
    """Sequences of 4 and 9 tokens, put into one batch, go on as they do alone."""
    model, topology = build()
    engine, tokens = Engine(model), some_tokens(2)
    lengths = (4, 9)
    alone = [engine.prefill(tokens[i : i + 1, :length])[1] for i, length in enumerate(lengths)]
    merged = model.zero_states(2)
    merged.is_start = False
    for i, states in enumerate(alone):
        merged.position_B[i] = states.position_B[0]
        for name, layer in merged.layers.items():
            for key, x in vars(layer).items():
                x[i] = vars(states.layers[name])[key][0]
    new = torch.stack([tokens[i, length : length + 5] for i, length in enumerate(lengths)])
    expected = [full_logits(model, topology, tokens[i : i + 1, : n + 5])[0, n:] for i, n in enumerate(lengths)]
    piece, _ = engine.prefill(new[:, :3], merged)
    found = torch.stack([piece, *(engine.decode_step(new[:, t], merged) for t in (3, 4))], dim=1)
    return error(found, torch.stack(expected)[:, 2:])


def test_rows_may_be_at_different_positions(worker_pool):
    assert worker_pool(1).run(rows_at_different_positions)[0] < 1e-10


def greedy(engine: Engine, prompts: Tensor, tokens: int) -> Tensor:
    """[B, tokens], in as many slots."""
    loop = engine.loop(len(prompts))
    loop.start(prompts)
    loop.prepare(LONG_RUN_STEPS)
    first = loop.token_B.clone()
    return torch.cat([first[:, None], loop.advance(tokens - 1)], dim=1)


def requested(engine: Engine, prompts: Tensor, tokens: int, slots: int) -> list[list[int]]:
    """Greedy tokens of `Engine.generate`, by request."""
    rows: list[list[int]] = [[] for _ in prompts]
    sampling = Sampling(max_new_tokens=tokens, temperature=0)
    for update in engine.generate([Request(tuple(row), sampling) for row in prompts.tolist()], slots):
        rows[update.request] += update.tokens
    return rows


def generated() -> dict[str, Any]:
    model, topology = build(vocab_size=89)
    engine, prompts = Engine(model, piece_tokens=1), some_tokens(tokens=5) % 89
    found = greedy(engine, prompts, NEW_TOKENS)
    sequence = prompts
    for _ in range(NEW_TOKENS):
        best = full_logits(model, topology, sequence)[:, -1, :89].argmax(-1)
        sequence = torch.cat([sequence, best[:, None]], dim=1)
    again, other = greedy(engine, prompts, NEW_TOKENS), greedy(engine, prompts[:1], NEW_TOKENS)
    states = model.zero_states(3)
    copy = engine.prefill(prompts, states)[1].clone()
    engine.decode_step(found[:, 0], states)
    return {
        "found": found.tolist(),
        "expected": sequence[:, 5:].tolist(),
        "again": again.tolist(),
        "alone": other.tolist(),
        "requested": [requested(engine, prompts, NEW_TOKENS, slots) for slots in (1, 2, 3, 5)],
        "copied": (
            copy.position_B.tolist(),
            error(engine.decode_step(found[:, 0], copy)[:, :89], states_logits(engine, prompts, found)),
        ),
        "bytes": states.bytes_per_sequence(),
    }


def states_logits(engine: Engine, prompts: Tensor, found: Tensor) -> Tensor:
    """Logits after the prompts and the first token found."""
    return engine.decode_step(found[:, 0], engine.prefill(prompts)[1])[:, :89]


def test_greedy_generation_is_the_repeated_forward(worker_pool):
    """Padding rows of the vocabulary are never chosen, and a second run starts anew."""
    (result,) = worker_pool(1).run(generated)
    assert result["found"] == result["expected"] == result["again"]
    assert result["alone"] == result["found"][:1]
    assert result["requested"] == [result["found"]] * 4, "however many slots there are"
    assert result["copied"][0] == [5, 5, 5] and result["copied"][1] < 1e-12
    # fp64: 2 conv [2, 64], 2 Taylor [4, 15, 8 + 1] with 16 places for buffered keys and values of each of 4 heads, 2 windows of
    # [4, 6, 8] keys and values, and the position; the counts of buffered keys are int32.
    assert result["bytes"] == 8 * (2 * 2 * 64 + 2 * 4 * (15 * 9 + 16 * (4 + 8)) + 2 * 2 * 4 * 6 * 8 + 1) + 2 * 4 * 4


def refusals() -> list[str]:
    messages = []
    full, _ = build(layer_pattern="cLSA")
    model, _ = build()
    for attempt in (
        lambda: Engine(full),
        lambda: Engine(model, piece_tokens=0),
        lambda: Engine(model).prefill(some_tokens(tokens=0)),
    ):
        with pytest.raises(ConfigError) as caught:
            attempt()
        messages.append(str(caught.value))
    return messages


def test_refusals_name_the_key(worker_pool):
    (messages,) = worker_pool(1).run(refusals)
    for message, key in zip(messages, ("model.layer_pattern", "piece_tokens", "prompt is empty"), strict=True):
        assert key in message


def refused_layout(**layout: int) -> str:
    config = Config(model=MODEL, parallel=ParallelConfig(**layout))
    with pytest.raises(ConfigError) as caught:
        Engine(build_model(config, topology_of(config.parallel), torch.float32)[0])
    return str(caught.value)


def test_layouts_that_cannot_decode_are_refused(worker_pool):
    assert "parallel.pipeline" in worker_pool(2).run(refused_layout, pipeline=2)[0]
    assert "parallel.sequence_parallel" in worker_pool(2).run(refused_layout, tensor=2)[0]


def decoded_over_ranks(tensor: int, **model: Any) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    """Logits of a prompt in pieces and of steps after it, and tokens of ragged requests, greedy and sampled."""
    config = dataclasses.replace(MODEL, **model)
    weights = {
        name: 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(len(name)), dtype=DOUBLE)
        for name, shape in our_shapes(config).items()
    }
    built = training_model(weights, config, topology_of(ParallelConfig(tensor=tensor)), DOUBLE)
    built.config.backend = "reference"
    engine, tokens = Engine(built, piece_tokens=max(4, config.prefix_tokens)), some_tokens() % 89
    logits = decoded_logits(engine, tokens, 7)[..., : config.vocab_size].cpu()
    rows = [tokens[i, : 3 + 4 * i].tolist() for i in range(3)]
    found = []
    for sampling in (Sampling(max_new_tokens=9, temperature=0), Sampling(max_new_tokens=9, top_p=0.9, seed=3)):
        texts: list[list[int]] = [[] for _ in rows]
        for update in engine.generate([Request(tuple(row), sampling) for row in rows], slots=2):
            texts[update.request] += update.tokens
        found.append([token for text in texts for token in text])
    return logits, *found


@pytest.mark.parametrize(
    "model", [{}, {"tie_embeddings": False, "vocab_size": 89}, {"prefix_tokens": 5}, {"feature_map": "rebased"}]
)
def test_tensor_parallel_ranks_decode_as_one_does(worker_pool, model):
    (expected,) = worker_pool(1).run(decoded_over_ranks, 1, **model)
    for logits, *texts in worker_pool(2).run(decoded_over_ranks, 2, **model):
        assert error(logits, expected[0]) < 1e-10 and tuple(texts) == expected[1:]


def prompts_of_one_shape() -> tuple[float, float, str]:
    """Errors of the second prompt's logits and of a step after it; the error for another shape."""
    model, topology = build(DOUBLE)
    tokens, engine = some_tokens(), Engine(model)
    prompts = PromptGraph(engine, 3, 6)
    prompts.run(tokens[:, 3:9])
    logits, states = prompts.run(tokens[:, :6])
    expected = full_logits(model, topology, tokens[:, :7])
    step = engine.decode_step(tokens[:, 6], states)
    try:
        prompts.run(tokens[:, :5])
    except ConfigError as refusal:
        return error(logits, expected[:, 5]), error(step, expected[:, 6]), str(refusal)
    return 0.0, 0.0, "accepted"


def test_prompts_of_one_shape_start_anew_in_their_buffers(worker_pool) -> None:
    ((logits_error, step_error, refusal),) = worker_pool(1).run(prompts_of_one_shape)
    assert logits_error < 1e-10 and step_error < 1e-10
    assert "[3, 5]" in refusal and "[3, 6]" in refusal
