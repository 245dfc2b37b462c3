"""Times of one training step of a rank: alone with its tokens, and among ranks that are absent, with all that an exchange makes it compute.

Legend: L tokens of the rank, one sequence of the batch.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import torch

from based_megatron.bench.keys import Method, Passes
from based_megatron.bench.timing import Bench
from based_megatron.model.based_model import BasedModel
from based_megatron.parallel.sequence.plan import SequencePlan, whole_sequence
from benchmarks.sequence_parallel.absent_ranks import among_absent_ranks, milliseconds, now, plan_among_absent_ranks
from benchmarks.sequence_parallel.results import Sharing, StepTime

GIB = 2**30
SLICES = 8
"""Number of ranks in the plan of the step that has a slice."""
REPEATS = 3


def step_times(bench: Bench, model: BasedModel, lengths: Sequence[int]) -> list[StepTime]:
    """Forward and backward at each length. From the first one on that does not fit otherwise, all activations are recomputed;
    a length that does not fit even so gets its time from the one before, in proportion, and says so."""
    found: list[StepTime] = []
    recompute = "none"
    for L in lengths:
        at_length = None
        while at_length is None:
            model.config.recompute = recompute  # type: ignore[assignment]
            try:
                at_length = _measured(bench, model, L, recompute == "full")
            except torch.cuda.OutOfMemoryError:
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                if recompute == "full":
                    at_length = extrapolated(found, L)
                recompute = "full"
        found += at_length
    model.config.recompute = "none"
    return found


def graph_times(bench: Bench, model: BasedModel, lengths: Sequence[int]) -> list[StepTime]:
    """Both passes replayed as one CUDA graph, where the device never waits for the host. A step that cannot be captured is left out."""
    found = []
    for L in lengths:
        tokens_1L = torch.randint(0, model.config.model.vocab_size, (1, L + 1), device=bench.device)
        for sharing, make_plan in _plans(bench, L).items():
            timing = bench.time(_step(model, make_plan(), tokens_1L), budget_ms=300.0)
            model.zero_grad(set_to_none=True)
            if timing.method is not Method.EVENTS:
                tokens_per_second = 1e3 * L / timing.ms
                found.append(StepTime(sharing, Passes.BOTH, L, timing.ms, True, tokens_per_second))
    return found


def time_step(
    bench: Bench, model: BasedModel, make_plan: Callable[[], SequencePlan], tokens_1L: torch.Tensor
) -> tuple[float, float, float]:
    """(milliseconds of forward, of both passes, GiB at the peak): medians of steps launched one by one, as training does."""
    on_gpu = bench.device.type == "cuda"
    inputs_1L, labels_1L = tokens_1L[:, :-1].contiguous(), tokens_1L[:, 1:].contiguous()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(1 + REPEATS):
        # A plan keeps what a recomputed pass needs again, so each step has its own.
        plan = make_plan()
        model.zero_grad(set_to_none=True)
        start = now(bench.device)
        loss = model(inputs_1L, plan, labels_1L).mean()
        middle = now(bench.device)
        loss.backward()
        times.append((start, middle, now(bench.device)))
        del loss
    if on_gpu:
        torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    peak_gib = torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0
    warm = times[1:]
    return (
        statistics.median(milliseconds(start, middle) for start, middle, _ in warm),
        statistics.median(milliseconds(start, end) for start, _, end in warm),
        peak_gib,
    )


def extrapolated(found: Sequence[StepTime], L: int) -> list[StepTime]:
    """Times of the longest length so far, in proportion to the tokens."""
    longest = max((step.length_tokens for step in found), default=0)
    return [
        dataclasses.replace(
            step, length_tokens=L, ms=step.ms * (L / longest), tokens_per_second=None, peak_gib=None,
            extrapolated_from_tokens=longest,
        )
        for step in found
        if step.length_tokens == longest
    ]  # fmt: skip


def _plans(bench: Bench, L: int) -> dict[Sharing, Callable[[], SequencePlan]]:
    """Plans of a rank that has the whole of its sequence, and of one that has a slice of a longer one."""

    def slice_of_many() -> SequencePlan:
        ranks = among_absent_ranks(SLICES // 2, SLICES, "all_gather")
        return plan_among_absent_ranks(ranks, L, bench.device)

    return {Sharing.WHOLE: lambda: whole_sequence(None, L, bench.device), Sharing.SLICE: slice_of_many}


def _step(model: BasedModel, plan: SequencePlan, tokens_1L: torch.Tensor) -> Callable[[], None]:
    inputs_1L, labels_1L = tokens_1L[:, :-1].contiguous(), tokens_1L[:, 1:].contiguous()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(inputs_1L, plan, labels_1L).mean().backward()

    return step


def _measured(bench: Bench, model: BasedModel, L: int, recomputed: bool) -> list[StepTime]:
    tokens_1L = torch.randint(0, model.config.model.vocab_size, (1, L + 1), device=bench.device)
    found = []
    for sharing, make_plan in _plans(bench, L).items():
        forward_ms, total_ms, peak_gib = time_step(bench, model, make_plan, tokens_1L)
        found += [
            StepTime(sharing, Passes.FORWARD, L, forward_ms, recomputed=recomputed),
            StepTime(
                sharing, Passes.BOTH, L, total_ms, tokens_per_second=1e3 * L / total_ms,
                peak_gib=peak_gib or None, recomputed=recomputed,
            ),
        ]  # fmt: skip
    return found
