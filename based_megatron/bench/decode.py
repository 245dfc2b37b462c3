"""`based bench decode`: one step of each mixer's state, and 1024 generated tokens, against a transformer of that size.

Legend: B sequences, L prompt tokens, N new tokens, H heads, F feature dim, V value head dim, S keys of a buffer,
R rows of a packed state, W window_left, D channels, K taps, U vocabulary columns.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from based_megatron.bench.keys import Baseline, Operation, Quantity, Sizes
from based_megatron.bench.models import based_model, llama, one_rank, parameters_in_billions, preset_name
from based_megatron.bench.report import Case, Check, Row, Target, relative_error
from based_megatron.bench.timing import Bench, attempt
from based_megatron.bench.work import Ceilings, measure_ceilings
from based_megatron.inference.batching import Batcher, Request
from based_megatron.inference.engine import Engine
from based_megatron.inference.loop import DecodingLoop
from based_megatron.inference.sampling import Sampling
from based_megatron.kernels.decode import (
    BUFFERED_KEYS,
    ConvState,
    TaylorState,
    WindowState,
    conv_step,
    taylor_step,
    window_step,
)
from based_megatron.kernels.packing import packed_rows
from based_megatron.kernels.rotary import rotary_tables
from based_megatron.model.based_model import BasedModel
from based_megatron.parallel.topology import Topology

TARGET_OF_FLOOR = 1.4
"""Time that a step of the Taylor state may take, over the floor of reading and writing all moments."""
TARGET_TOKENS_PER_SECOND = 60_000.0
Ceiling = Callable[[], Ceilings]


def cases(bench: Bench) -> list[Case]:
    """The cases of `based bench decode`."""
    ceilings = functools.cache(lambda: measure_ceilings(bench))
    return [
        *(Case(f"taylor step V{V}", functools.partial(taylor_row, bench, ceilings, V)) for V in (64, 112)),
        Case("window step", lambda: window_row(bench, ceilings)),
        Case("conv step", lambda: conv_row(bench, ceilings)),
        Case("generation", lambda: generation_row(bench, ceilings)),
    ]


def taylor_row(bench: Bench, ceilings: Ceiling, V: int) -> Row:
    """A step of Taylor attention.

    Every moment is read, and written in one of N + 1 steps; the mean of N / 2 buffered keys is read, one is written.
    Heads begin with different numbers of buffered keys, so that every step absorbs the same part of them.
    """
    B, H, F, N = bench.size(128, 2), bench.size(16, 2), 16, BUFFERED_KEYS
    moments = 4 * packed_rows(F) * (V + 1) * (1 + 1 / (N + 1))
    moved = int(B * H * (moments + 2 * (F + V) * (N / 2 + 1) + 2 * 2 * (F + V)))

    def inputs() -> tuple[Any, ...]:
        state = TaylorState.zeros(B, H, F, V, dtype=bench.dtype, device=bench.device)
        state.moments_BHRV.copy_(bench.random(*state.moments_BHRV.shape))
        state.normaliser_BHR[..., -1] = 100  # as of many tokens: it is positive
        state.k_BHSF.copy_(bench.random(*state.k_BHSF.shape))
        state.v_BHSV.copy_(bench.random(*state.v_BHSV.shape))
        state.buffered_BH.random_(0, N + 1)
        return bench.random(B, H, F), bench.random(B, H, F), bench.random(B, H, V), state

    row = _step_row(
        bench,
        ceilings,
        Operation.TAYLOR_STEP,
        Sizes(batch=B, heads=H, feature_dim=F, head_dim=V),
        taylor_step,
        inputs,
        moved,
    )
    plain_ms = ceilings().floor_ms(2 * 4 * B * H * packed_rows(F) * (V + 1))
    return dataclasses.replace(
        row,
        target=None if bench.quick else Target("at most", TARGET_OF_FLOOR * plain_ms),
        rates={**row.rates, Quantity.UNBUFFERED_FLOOR_RATIO: row.value / plain_ms},
    )


def window_row(bench: Bench, ceilings: Ceiling) -> Row:
    """A step of a window: W keys and values are read, one of each is written."""
    B, H, V, W = bench.size(128, 2), bench.size(16, 2), bench.size(112, 16), bench.size(128, 8)
    position_B = torch.full((B,), 1000, device=bench.device)
    tables = rotary_tables(position_B, V, 1.0, 1e4)

    def inputs() -> tuple[Any, ...]:
        state = WindowState(bench.random(B, H, W + 1, V), bench.random(B, H, W + 1, V))
        return *(bench.random(B, H, V) for _ in range(3)), *tables, state, position_B

    sizes, moved = Sizes(batch=B, heads=H, head_dim=V, window_left=W), 2 * 2 * B * H * V * (W + 3)
    return _step_row(bench, ceilings, Operation.WINDOW_STEP, sizes, window_step, inputs, moved)


def conv_row(bench: Bench, ceilings: Ceiling) -> Row:
    """A step of a convolution: K - 1 inputs are read and written."""
    B, D, K = bench.size(128, 2), bench.size(3584, 64), 3

    def inputs() -> tuple[Any, ...]:
        state = ConvState(bench.random(B, K - 1, D))
        return *bench.random(B, 2 * D).chunk(2, dim=-1), bench.random(D, K), state

    sizes, moved = Sizes(batch=B, channels=D, taps=K), 2 * B * D * (2 * K + 1)
    return _step_row(bench, ceilings, Operation.CONV_STEP, sizes, conv_step, inputs, moved)


def _step_row(
    bench: Bench,
    ceilings: Ceiling,
    operation: Operation,
    sizes: Sizes,
    step: Callable[..., Tensor],
    inputs: Callable[[], tuple[Any, ...]],
    moved: int,
) -> Row:
    """Check output and state of one step against fp64 on the inputs, then time it over enough states to miss the cache."""
    torch.manual_seed(bench.seed)
    sets = [inputs() for _ in range(bench.copies(moved // 2))]
    exact = [_in_double(x) for x in sets[0]]
    expected = step(*exact)
    found = step(*sets[0], backend=bench.backend)
    rough = bench.dtype == torch.bfloat16
    checks = {"o": Check(relative_error(found, expected), 3e-3 if rough else 1e-5)}
    for got, want in zip(sets[0], exact, strict=True):
        if isinstance(got, TaylorState):
            # Where a token is, absorbed or buffered, is up to the implementation.
            checks["state"] = Check(relative_error(got.joined(), want.joined()), 1e-5)
        elif dataclasses.is_dataclass(got):
            for field, x in vars(got).items():
                limit = 1e-5 if x.dtype == torch.float32 else 3e-3
                checks[field] = Check(relative_error(x, vars(want)[field]), limit)
    timing = bench.time([functools.partial(step, *one, backend=bench.backend) for one in sets])
    floor = ceilings().floor_ms(moved)
    rates = {Quantity.GIGABYTES_PER_SECOND: moved / timing.ms / 1e6, Quantity.FLOOR_RATIO: timing.ms / floor}
    return Row(operation, timing.ms, sizes=sizes, method=timing.method, floor=floor, checks=checks, rates=rates)


def _in_double(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    return dataclasses.replace(x, **{field: tensor.double() for field, tensor in vars(x).items()})


def generation_row(bench: Bench, ceilings: Ceiling) -> Row:
    """Tokens per second of greedy generation after a short prompt, prefill included."""
    B, L, N = bench.size(128, 2), bench.size(16, 4), bench.size(1024, 8)
    with one_rank(bench) as topology:
        model = based_model(bench, topology)
        checks = agreement(bench, model, topology, [L, L + 1, 4 * L])
        loop = Engine(model).loop(B)
        prompt_BL = torch.randint(0, model.config.model.vocab_size, (B, L), device=bench.device)
        loop.start(prompt_BL)  # warms up
        loop.prepare(N)
        start = _now(bench)
        loop.start(prompt_BL)
        loop.advance(N - 1)
        seconds = _now(bench) - start
        step_ms = bench.time(functools.partial(loop.advance, 1), graph=False).ms
        requests_rate = rate_of_requests(bench, loop, prompt_BL, N)
        state_bytes = loop.states.bytes_per_sequence()
        moved = bytes_of_step(model, B)
        size = parameters_in_billions(model)
        del loop, model
    return Row(
        Operation.GENERATION,
        B * N / seconds,
        Quantity.TOKENS_PER_SECOND,
        sizes=Sizes(batch=B, prompt_tokens=L, new_tokens=N),
        model=preset_name(bench),
        target=None if bench.quick else Target("at least", TARGET_TOKENS_PER_SECOND),
        floor=1e3 * B / ceilings().floor_ms(moved),
        baselines={
            Baseline.LLAMA_DYNAMIC_CACHE: transformer(bench, B, L, N, _dynamic_steps),
            Baseline.LLAMA_STATIC_CACHE: "not in a quick run"
            if bench.quick
            else transformer(bench, B, L, N, _static_steps),
        },
        checks=checks,
        rates={
            Quantity.REQUESTS_TOKENS_PER_SECOND: requests_rate,
            Quantity.STEP_MILLISECONDS: step_ms,
            Quantity.STEP_GIGABYTES: moved / 1e9,
            Quantity.STATE_MEGABYTES: state_bytes / 1e6,
        },
        note=f"{size:.3f} G parameters. Baseline: Hugging Face Llama, steps timed at a few lengths and integrated, prefill left out",
    )


def rate_of_requests(bench: Bench, loop: DecodingLoop, prompt_BL: Tensor, new_tokens: int) -> float:
    """Tokens per second of the same texts as requests to a `Batcher`, whose tokens the host looks at."""
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0)
    requests = [Request(tuple(row), sampling) for row in prompt_BL.tolist()]
    start = _now(bench)
    tokens = sum(len(update.tokens) for update in Batcher(loop).run(requests))
    return tokens / (_now(bench) - start)


def bytes_of_step(model: BasedModel, batch: int) -> float:
    """Bytes that one step must move: weights once, convolution states in and out, windows in, Taylor states in and sometimes out."""
    passes = {WindowState: 1.0, TaylorState: 1 + 1 / (BUFFERED_KEYS + 1), ConvState: 2.0}
    states = model.zero_states(1).layers.values()
    each = sum(passes[type(state)] * x.nbytes for state in states for x in vars(state).values())
    return sum(parameter.nbytes for parameter in model.parameters()) + batch * each


def agreement(bench: Bench, model: BasedModel, topology: Topology, prompts: Sequence[int]) -> dict[str, Check]:
    """Errors of the last logits against the reference operations in fp32: of sequences prefilled up to a prompt and then decoded.

    The limit in bf16 is what the full forward of the reference ops in bf16 is off by, times 1.5.
    """
    L = max(prompts)
    exact_bench = dataclasses.replace(bench, dtype=torch.float32, backend="reference")
    exact = based_model(exact_bench, topology)
    exact.load_state_dict(
        {name: x.float() for name, x in model.state_dict().items() if torch.is_tensor(x)}, strict=False
    )
    tokens_BL = torch.randint(0, model.config.model.vocab_size, (2, L), device=bench.device)
    expected_BU, _ = Engine(exact).prefill(tokens_BL)
    del exact
    limit = 1e-4
    if bench.dtype == torch.bfloat16:
        model.config.backend = "reference"
        rounded_BU, _ = Engine(model).prefill(tokens_BL)
        model.config.backend = bench.backend
        limit = 1.5 * relative_error(rounded_BU, expected_BU)
    engine, checks = Engine(model), {}
    for prompt in prompts:
        logits_BU, states = engine.prefill(tokens_BL[:, :prompt])
        for t in range(prompt, L):
            logits_BU = engine.decode_step(tokens_BL[:, t], states)
        checks[f"logits, {prompt} + {L - prompt} tokens (fp32)"] = Check(relative_error(logits_BU, expected_BU), limit)
    return checks


def transformer(
    bench: Bench, B: int, L: int, N: int, steps_ms: Callable[[Bench, Any, int, int, int], float]
) -> float | str:
    """Tokens per second of a Hugging Face Llama's decoding steps, or why there are none."""
    with torch.no_grad():
        return attempt(lambda: 1e3 * B * N / steps_ms(bench, llama(bench), B, L, N))


def _dynamic_steps(bench: Bench, model: Any, B: int, L: int, N: int) -> float:
    """Milliseconds of N steps: the cache grows and so does the time, taken to be linear between a few lengths."""
    from transformers import DynamicCache

    from based_megatron.convert.hf_files.modeling_based import CACHE_NAME

    config, token_B1 = model.config, torch.zeros(B, 1, dtype=torch.int64, device=bench.device)
    head_dim = config.hidden_size // config.num_attention_heads
    lengths = [L, L + N // 4, L + N // 2, L + N]
    times = []
    for length in lengths:
        cache = DynamicCache()
        for layer in range(config.num_hidden_layers):
            shape = (B, config.num_key_value_heads, length, head_dim)
            cache.update(bench.random(*shape), bench.random(*shape), layer)

        def step(cache: Any = cache) -> None:
            logits = model(input_ids=token_B1, **{CACHE_NAME: cache}, use_cache=True).logits
            token_B1.copy_(logits[:, -1:].argmax(-1))

        times.append(_median_ms(bench, step, 5))
        del cache, step
    places = list(zip(lengths, times, strict=True))
    return sum((after - before) * (t0 + t1) / 2 for (before, t0), (after, t1) in pairwise(places))


def _static_steps(bench: Bench, model: Any, B: int, L: int, N: int) -> float:
    """Milliseconds of N steps: each attends to the whole cache, whatever is in it, and takes the same time."""
    from transformers import StaticCache

    from based_megatron.convert.hf_files.modeling_based import CACHE_NAME

    cache = StaticCache(config=model.config, max_cache_len=L + N)
    model(input_ids=torch.zeros(B, L, dtype=torch.int64, device=bench.device), **{CACHE_NAME: cache}, use_cache=True)
    token_B1 = torch.zeros(B, 1, dtype=torch.int64, device=bench.device)
    forward = torch.compile(model.forward, mode="reduce-overhead")

    def step() -> None:
        logits = forward(input_ids=token_B1, **{CACHE_NAME: cache}, use_cache=True).logits
        token_B1.copy_(logits[:, -1:].argmax(-1))

    for _ in range(3):
        step()
    return N * _median_ms(bench, step, 15)


def _median_ms(bench: Bench, step: Callable[[], None], repeats: int) -> float:
    step()
    times = []
    for _ in range(repeats):
        start = _now(bench)
        step()
        times.append(1e3 * (_now(bench) - start))
    return sorted(times)[repeats // 2]


def _now(bench: Bench) -> float:
    """The time in seconds, once all work so far is done."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
