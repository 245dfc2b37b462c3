"""Times of the parts of one rank that shares a sequence with others, which are absent.

Legend: L tokens of a rank's slice, D hidden size, H heads, F feature dim, V value head dim, W window_left, C channels, K taps,
R packed rows, E = V + 1.
"""

from __future__ import annotations

import functools
import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from based_megatron.bench.keys import Passes
from based_megatron.bench.models import model_config
from based_megatron.bench.timing import Bench, forward_backward
from based_megatron.kernels.exchange import Halo
from based_megatron.kernels.gated_conv import gated_conv_over_slices
from based_megatron.kernels.packing import packed_rows
from based_megatron.kernels.rotary import apply_rotary, rotary_tables
from based_megatron.kernels.sliding_window import sliding_window_over_slices
from based_megatron.kernels.taylor_attention import attention
from based_megatron.model.based_model import BasedModel
from based_megatron.model.mixers import MIXERS, Mixer, MixerInputs
from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.sequence.scan import start_gated_sum
from benchmarks.sequence_parallel.absent_ranks import (
    AbsentChannel,
    among_absent_ranks,
    milliseconds,
    plan_among_absent_ranks,
)
from benchmarks.sequence_parallel.results import LAYERS, CoverTime, Layer, LocalWork, Part, PartTime
from benchmarks.sequence_parallel.slices import ALGORITHMS

COVER_RANKS = 8
"""Number of ranks in the plan with which covers are timed; they do not depend on it."""
HOLD_CYCLES = 20_000_000
"""The GPU waits so long, about 10 ms, while the host launches what is then timed."""


@dataclass(frozen=True)
class NothingReturns:
    """The return path of a halo (kernels/exchange.py) on which no gradient arrives."""

    rows: int
    """Number of own rows that other ranks have seen."""

    def start_return(self, dhalo: Tensor) -> Pending[Tensor]:
        return Pending.done(dhalo.new_zeros(dhalo.shape[0], self.rows, *dhalo.shape[2:]))


def part_times(bench: Bench, L: int) -> list[PartTime]:
    """Parts of the three mixers at one length."""
    return [*_attention_parts(bench, L), *_window_parts(bench, L), *_conv_parts(bench, L)]


def _attention_parts(bench: Bench, L: int) -> list[PartTime]:
    """Linear attention, in the order in which a rank runs it."""
    model = model_config(bench)
    D, H, F = model.hidden_size, model.num_heads, model.feature_dim
    V, R = D // H, packed_rows(F)
    steps = taylor_steps(bench)
    x, of_q, of_kv = bench.random(L, D), bench.random(H * F, D, scale=0.02), bench.random(H * (F + V), D, scale=0.02)
    q, k = bench.random(1, L, H, F), bench.random(1, L, H, F)
    v, do = bench.random(1, L, H, V), bench.random(1, L, H, V)
    before = torch.rand(1, H, R, V + 1, device=bench.device)
    module, schedule = steps.backend, steps.schedule
    states = module.scan_keys(k, v, None, schedule).states(before)
    o, z = module.attend(q, k, v, None, states, schedule)
    g, gz = module.output_gradients(do, o, z)
    given = (q, k, v, g, gz, None)

    def outputs() -> object:
        return module.attend(q, k, v, None, module.scan_keys(k, v, None, schedule).states(before), schedule)

    def key_gradients() -> object:
        adjoints = module.scan_queries(q, g, gz, None, schedule).states(before)
        return module.key_gradients(*given, adjoints, schedule)

    parts: dict[Part, Callable[[], object]] = {
        Part.KEY_VALUE_PROJECTION: lambda: functional.linear(x, of_kv),
        Part.SEGMENT_STATE: lambda: module.scan_keys(k, v, None, schedule).moments(),
        Part.QUERY_PROJECTION: lambda: functional.linear(x, of_q),
        Part.OUTPUTS: outputs,
        Part.OUTPUT_GRADIENTS: lambda: module.output_gradients(do, o, z),
        Part.ADJOINT_SEGMENT_STATE: lambda: module.scan_queries(q, g, gz, None, schedule).moments(),
        Part.DQ: lambda: module.query_gradients(*given, states, schedule),
        Part.DK_DV: key_gradients,
    }
    return [_part(bench, Layer.LINEAR_ATTENTION, part, L, call) for part, call in parts.items()]


def _window_parts(bench: Bench, L: int) -> list[PartTime]:
    """The sliding window, with its halo there."""
    model = model_config(bench)
    D, H, W = model.hidden_size, model.num_heads, model.window_left
    V, boundary_rows = D // H, min(model.window_left, L)
    x, of_qkv = bench.random(L, D), bench.random(3 * D, D, scale=0.02)
    q, k, v = (bench.random(1, L, H, V) for _ in range(3))
    halo = Halo(Pending.done(bench.random(1, W, 2, H, V)), NothingReturns(boundary_rows))
    tables = rotary_tables(torch.arange(L, device=bench.device), V, model.rotary_fraction, model.rotary_base)

    def boundary() -> object:
        k, v = functional.linear(x[L - boundary_rows :], of_qkv[D:]).view(1, boundary_rows, 2, H, V).unbind(2)
        k = apply_rotary(k, *(table[L - boundary_rows :] for table in tables), backend=bench.backend)
        return torch.stack([k, v], dim=2)

    run = functools.partial(sliding_window_over_slices, window_left=W, backend=bench.backend)
    return [
        _part(bench, Layer.SLIDING_WINDOW, Part.BOUNDARY_PROJECTION, L, boundary),
        _part(bench, Layer.SLIDING_WINDOW, Part.PROJECTION, L, lambda: functional.linear(x, of_qkv)),
        *_both_passes(bench, Layer.SLIDING_WINDOW, L, lambda q, k, v: run(q, k, v, halo), (q, k, v)),
    ]


def _conv_parts(bench: Bench, L: int) -> list[PartTime]:
    """The gated convolution, with its halo there."""
    model = model_config(bench)
    D, K = model.hidden_size, model.conv_kernel
    C, boundary_rows = D * model.conv_expand // 2, min(K - 1, L)
    x, weight, bias = bench.random(L, D), bench.random(2 * C, D, scale=0.02), bench.random(2 * C)
    halo = Halo(Pending.done(bench.random(1, K - 1, C)), NothingReturns(boundary_rows))
    projected, taps = bench.random(1, L, 2 * C), bench.random(C, K)
    run = functools.partial(gated_conv_over_slices, backend=bench.backend)
    boundary = functools.partial(functional.linear, x[L - boundary_rows :], weight[:C], bias[:C])
    return [
        _part(bench, Layer.GATED_CONV, Part.BOUNDARY_PROJECTION, L, boundary),
        _part(bench, Layer.GATED_CONV, Part.PROJECTION, L, lambda: functional.linear(x, weight, bias)),
        *_both_passes(
            bench, Layer.GATED_CONV, L, lambda projected, taps: run(projected, taps, halo), (projected, taps)
        ),
    ]


def cover_times(bench: Bench, model: BasedModel, L: int) -> list[CoverTime]:
    """Time between the start of an exchange and the wait for it in the mixers as they are: what can hide it."""
    found = []
    for letter, mixer in _mixers(model).items():
        if letter in LAYERS:
            forward_ms, backward_ms = covers(bench, mixer, L)
            found += [
                CoverTime(LAYERS[letter], Passes.FORWARD, L, forward_ms),
                CoverTime(LAYERS[letter], Passes.BACKWARD, L, backward_ms),
            ]
    return found


def covers(bench: Bench, mixer: Mixer, L: int) -> tuple[float, float]:
    """(forward, backward) milliseconds between start and wait; medians."""
    settings = model_config(bench)
    ranks = among_absent_ranks(COVER_RANKS // 2, COVER_RANKS, "all_gather")
    plan = plan_among_absent_ranks(ranks, L, bench.device)
    positions = torch.arange(plan.start, plan.end, device=bench.device)
    head_dim = settings.hidden_size // settings.num_heads
    inputs = MixerInputs(plan, rotary_tables(positions, head_dim, settings.rotary_fraction, settings.rotary_base))
    x = bench.random(L, 1, settings.hidden_size).requires_grad_()
    grad = bench.random(L, 1, settings.hidden_size)
    found: list[tuple[float, float]] = []
    for repeat in range(bench.size(8, 3)):
        if bench.device.type == "cuda":
            torch.cuda._sleep(HOLD_CYCLES)
        torch.autograd.grad(mixer(x, inputs=inputs)[0], x, grad)
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        channels = [channel for channel in (ranks.states, ranks.halos) if isinstance(channel, AbsentChannel)]
        (forward, backward), *_ = [channel.covers for channel in channels if channel.covers]
        if repeat >= 2:
            found.append((milliseconds(*forward), milliseconds(*backward)))
        for channel in channels:
            channel.covers.clear()
    return statistics.median(f for f, _ in found), statistics.median(b for _, b in found)


def local_work(bench: Bench, rank_counts: tuple[int, ...], node_ranks: int) -> list[LocalWork]:
    """Packing of one state, and sums over what has come, for each way and number of ranks."""
    model = model_config(bench)
    H, R, E = model.num_heads, packed_rows(model.feature_dim), model.hidden_size // model.num_heads + 1
    state = torch.rand(1, H, R, E, device=bench.device)
    found = []
    for P in rank_counts:
        for way, algorithm in ALGORITHMS.items():
            ranks = among_absent_ranks(P // 2, P, algorithm, min(P, node_ranks))
            plan = plan_among_absent_ranks(ranks, 1, bench.device)
            timing = bench.time(functools.partial(_wait_for_sum, state, plan))
            found.append(LocalWork(way, P, timing.ms, timing.method))
    return found


def taylor_steps(bench: Bench) -> attention.Steps:
    """The steps of the kernels that are timed."""
    name = {"triton": "triton_attention"}.get(bench.backend, "reference")
    module = importlib.import_module(f"based_megatron.kernels.taylor_attention.{name}")
    return attention.Steps(module, module.schedule(None, torch.empty(0, device=bench.device, dtype=bench.dtype)))


def _wait_for_sum(state: Tensor, plan: SequencePlan) -> Tensor:
    return start_gated_sum(state, plan).wait()


def _mixers(model: BasedModel) -> dict[str, Mixer]:
    """One mixer of each kind, by its letter."""
    letters = {cls: letter for letter, cls in MIXERS.items()}
    return {letters[type(layer.mixer)]: layer.mixer for layer in model.layers.values()}  # type: ignore[index,union-attr,misc]


def _both_passes(
    bench: Bench, layer: Layer, L: int, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> list[PartTime]:
    """Forward, and forward + backward less forward."""
    with torch.no_grad():
        grad = torch.randn_like(run(*inputs))
        forward = bench.time(lambda: run(*inputs))
    both = bench.time(forward_backward(run, inputs, grad))
    return [
        PartTime(layer, Part.FORWARD, L, forward.ms, forward.method),
        PartTime(layer, Part.BACKWARD, L, both.ms - forward.ms, both.method),
    ]


def _part(bench: Bench, layer: Layer, part: Part, L: int, call: Callable[[], object]) -> PartTime:
    with torch.no_grad():
        timing = bench.time(call)
    return PartTime(layer, part, L, timing.ms, timing.method)
