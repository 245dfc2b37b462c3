"""One training step of a rank: alone with its tokens, and beside ranks that are absent, with all that an exchange makes it compute.

Legend: L tokens of the rank, one sequence of the batch.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import torch

from based_megatron.bench.absent_ranks import beside_absent_ranks, milliseconds, moment, plan_beside_absent_ranks
from based_megatron.bench.report import Row
from based_megatron.bench.timing import Bench
from based_megatron.model.based_model import BasedModel
from based_megatron.parallel.sequence.plan import SequencePlan, whole_sequence

GIB = 2**30
SLICES = 8
"""Ranks that the step beside absent ones thinks it shares the sequence with."""
REPEATS = 3


def step_rows(bench: Bench, model: BasedModel, lengths: Sequence[int]) -> list[Row]:
    """Forward and backward at each length. From the first one on that does not fit otherwise, all activations are recomputed;
    a length that does not fit even so gets its time from the one before, in proportion, and says so."""
    rows: list[Row] = []
    recompute = "none"
    for L in lengths:
        of_length = None
        while of_length is None:
            model.config.recompute = recompute  # type: ignore[assignment]
            try:
                of_length = _measured(bench, model, L, recompute)
            except torch.cuda.OutOfMemoryError:
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                if recompute == "full":
                    of_length = _extrapolated(rows, L)
                recompute = "full"
        rows += of_length
    model.config.recompute = "none"
    return rows


def graph_rows(bench: Bench, model: BasedModel, lengths: Sequence[int]) -> list[Row]:
    """Both passes replayed as one CUDA graph, where the device never waits for the host. A step that cannot be captured has no row."""
    rows = []
    for L in lengths:
        tokens_1L = torch.randint(0, model.config.model.vocab_size, (1, L + 1), device=bench.device)
        for name, make_plan in _plans(bench, L).items():
            timing = bench.time(_step(model, make_plan(), tokens_1L), budget_ms=300.0)
            model.zero_grad(set_to_none=True)
            if timing.method != "events":
                rates = {"tok/s": 1e3 * L / timing.ms}
                rows.append(Row(f"{name}, forward + backward as a CUDA graph", f"L{L}", timing.ms, rates=rates))
    return rows


def _plans(bench: Bench, L: int) -> dict[str, Callable[[], SequencePlan]]:
    """A rank that has the whole of its sequence, and one that has a slice of a longer one."""

    def slice_of_many() -> SequencePlan:
        ranks = beside_absent_ranks(SLICES // 2, SLICES, "all_gather")
        return plan_beside_absent_ranks(ranks, L, bench.device)

    return {"step: whole sequence": lambda: whole_sequence(None, L, bench.device), "step: slice": slice_of_many}


def _step(model: BasedModel, plan: SequencePlan, tokens_1L: torch.Tensor) -> Callable[[], None]:
    inputs_1L, labels_1L = tokens_1L[:, :-1].contiguous(), tokens_1L[:, 1:].contiguous()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(inputs_1L, plan, labels_1L).mean().backward()

    return step


def _measured(bench: Bench, model: BasedModel, L: int, recompute: str) -> list[Row]:
    tokens_1L = torch.randint(0, model.config.model.vocab_size, (1, L + 1), device=bench.device)
    rows = []
    for name, make_plan in _plans(bench, L).items():
        forward, total, peak_gib = time_step(bench, model, make_plan, tokens_1L)
        rates = {"tok/s": 1e3 * L / total} | ({"GiB peak": peak_gib} if peak_gib else {})
        note = "all activations recomputed" if recompute == "full" else ""
        rows += [
            Row(f"{name}, forward", f"L{L}", forward, note=note),
            Row(f"{name}, forward + backward", f"L{L}", total, rates=rates, note=note),
        ]
    return rows


def time_step(
    bench: Bench, model: BasedModel, make_plan: Callable[[], SequencePlan], tokens_1L: torch.Tensor
) -> tuple[float, float, float]:
    """(milliseconds of forward, of both passes, GiB at the peak): medians of steps launched one by one, as training does."""
    on_gpu = bench.device.type == "cuda"
    inputs_1L, labels_1L = tokens_1L[:, :-1].contiguous(), tokens_1L[:, 1:].contiguous()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    moments = []
    for _ in range(1 + REPEATS):
        # A plan keeps what a recomputed pass needs again, so each step has its own.
        plan = make_plan()
        model.zero_grad(set_to_none=True)
        start = moment(bench.device)
        loss = model(inputs_1L, plan, labels_1L).mean()
        middle = moment(bench.device)
        loss.backward()
        moments.append((start, middle, moment(bench.device)))
        del loss
    if on_gpu:
        torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    peak_gib = torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0
    warm = moments[1:]
    return (
        statistics.median(milliseconds(start, middle) for start, middle, _ in warm),
        statistics.median(milliseconds(start, end) for start, _, end in warm),
        peak_gib,
    )


def _extrapolated(rows: Sequence[Row], L: int) -> list[Row]:
    """The rows of the longest length so far, in proportion to the tokens."""
    longest = rows[-1].shape if rows else ""
    factor = L / int(longest.removeprefix("L")) if longest else 0.0
    return [
        dataclasses.replace(
            row, shape=f"L{L}", value=row.value * factor, rates={}, source="modelled",
            note=f"does not fit this device: {factor:g} x {longest}",
        )
        for row in rows
        if row.shape == longest
    ]  # fmt: skip
