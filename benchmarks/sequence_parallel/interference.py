"""Slowdown of kernels while an exchange moves bytes: in place of NCCL's kernels, a kernel copies at a link's rate.

C programs of a copy kernel run on a stream of their own, as many as a collective has channels, all the while that the kernels
that hide the exchange run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from based_megatron.bench.models import model_config
from based_megatron.bench.timing import Bench
from based_megatron.kernels.packing import packed_rows
from benchmarks.sequence_parallel.rank_parts import taylor_steps
from benchmarks.sequence_parallel.results import CoveringKernel, Slowdown

CHANNELS = (4, 8, 16)
BUFFER_BYTES = 8 << 20
BLOCK = 8192
REPEATS = 20


@triton.jit
def copy_round(source, target, rounds, elements, BLOCK: tl.constexpr):
    """Copy all elements, so many times, with as many programs as there are channels."""
    for _ in range(rounds):
        for first in range(tl.program_id(0) * BLOCK, elements, tl.num_programs(0) * BLOCK):
            places = first + tl.arange(0, BLOCK)
            tl.store(target + places, tl.load(source + places, mask=places < elements), mask=places < elements)


def slowdowns(bench: Bench, L: int) -> list[Slowdown]:
    """Slowdowns of the kernels that hide states (query projection, dq) and halos (a projection)."""
    found = []
    for kernel, call in covering_calls(bench, L).items():
        alone_ms = _repeated_ms(call)
        for channels in CHANNELS:
            during_copy_ms, rate = _during_copy(call, channels, alone_ms)
            found.append(Slowdown(kernel, L, channels, during_copy_ms / alone_ms, rate, alone_ms / REPEATS))
    return found


def covering_calls(bench: Bench, L: int) -> dict[CoveringKernel, Callable[[], object]]:
    """The kernels between the start of an exchange and the wait for it."""
    model = model_config(bench)
    D, H, F = model.hidden_size, model.num_heads, model.feature_dim
    V, R = D // H, packed_rows(F)
    steps = taylor_steps(bench)
    x, of_q, of_qkv = bench.random(L, D), bench.random(H * F, D), bench.random(3 * D, D)
    q, k = bench.random(1, L, H, F), bench.random(1, L, H, F)
    v, do = bench.random(1, L, H, V), bench.random(1, L, H, V)
    states = steps.backend.scan_keys(k, v, None, steps.schedule).states(torch.rand(1, H, R, V + 1, device=bench.device))
    o, z = steps.backend.attend(q, k, v, None, states, steps.schedule)
    g, gz = steps.backend.output_gradients(do, o, z)
    return {
        CoveringKernel.QUERY_PROJECTION: functools.partial(torch.nn.functional.linear, x, of_q),
        CoveringKernel.DQ: lambda: steps.backend.query_gradients(q, k, v, g, gz, None, states, steps.schedule),
        CoveringKernel.WINDOW_PROJECTION: functools.partial(torch.nn.functional.linear, x, of_qkv),
    }


def _during_copy(call: Callable[[], object], channels: int, alone_ms: float) -> tuple[float, float]:
    """(milliseconds of the repeated call during the copy, GB/s that the copy alone reaches)."""
    source = torch.rand(BUFFER_BYTES // 4, device="cuda")
    target = torch.empty_like(source)

    def copy(rounds: int) -> None:
        copy_round[(channels,)](source, target, rounds, source.numel(), BLOCK=BLOCK, num_warps=8)

    copy(2)
    one_round_ms = _elapsed_ms(lambda: copy(20)) / 20
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        copy(2 + round(3 * alone_ms / one_round_ms))
        copied = side.record_event()
    during_copy_ms = _repeated_ms(call, warm=False)
    assert not copied.query(), "the copy ended before the calls that it should slow down"
    torch.cuda.synchronize()
    return during_copy_ms, source.nbytes / one_round_ms / 1e6


def _repeated_ms(call: Callable[[], object], warm: bool = True) -> float:
    if warm:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    return _elapsed_ms(lambda: [call() for _ in range(REPEATS)])


def _elapsed_ms(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
