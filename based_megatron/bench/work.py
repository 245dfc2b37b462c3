"""One kernel under test: checked against the reference in fp64, then timed, forward and backward, against baselines.

What is checked is what is timed: outputs and gradients of the first set of inputs, compared on a few heads, channels or tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from based_megatron.bench.keys import Baseline, Operation, Passes, Quantity, Sizes
from based_megatron.bench.report import Check, Row, Target, relative_error
from based_megatron.bench.timing import Bench, Timing, forward_backward

Run = Callable[..., Any]
Prepare = Callable[..., tuple[Run, Sequence[Tensor]]]
"""A function from our inputs to a baseline's function and its inputs."""


@dataclass(frozen=True)
class Ceilings:
    """The best that the device does, measured in the same run."""

    bytes_per_ms: float
    flops_per_ms: float

    def floor_ms(self, moved: float, flops: float = 0.0) -> float:
        """The larger of the two times."""
        return max(moved / self.bytes_per_ms, flops / self.flops_per_ms)


@dataclass(frozen=True)
class Work:
    """One op at one size."""

    operation: Operation
    sizes: Sizes
    run: Run
    """(*inputs, backend) to one output, or several."""
    inputs: Callable[[], Sequence[Tensor]]
    """Fresh random inputs."""
    cut: Callable[[Tensor, int], Tensor]
    """(input i, or output at i = -1) to the part that is checked, on which the op gives the same result alone."""
    gradients: tuple[str, ...]
    """Names of the inputs' gradients."""
    limits: Mapping[str, float]
    """Largest relative errors in bf16, of `o` and the gradients."""
    moved: tuple[float, float]
    """Bytes that must be read and written, forward and forward + backward."""
    flops: tuple[float, float] = (0.0, 0.0)
    targets: tuple[float | None, float | None] = (None, None)
    """Milliseconds, forward and forward + backward."""
    baselines: Mapping[Baseline, Prepare] = field(default_factory=dict)
    splits_backward: bool = False
    """Report backward alone: forward + backward less forward."""
    note: str = ""


def measure_ceilings(bench: Bench) -> Ceilings:
    """Copy bandwidth, and the rate of a large matrix product on random data."""
    side = bench.size(8192, 64)
    a, b = bench.random(side, side), bench.random(side, side)
    return Ceilings(copy_bandwidth(bench), 2 * side**3 / bench.time(lambda: a @ b).ms)


def copy_bandwidth(bench: Bench) -> float:
    """Bytes read and written in a millisecond by the faster of two ways to copy 4 GiB."""
    source = torch.empty(bench.size(2**30, 2**16), dtype=torch.float32, device=bench.device).fill_(1)
    target = torch.empty_like(source)
    # By events: a copy inside a graph is another operation, and slower. An addition is a copy by a kernel.
    copies = (lambda: target.copy_(source), lambda: torch.add(source, 1, out=target))
    copy_ms = min(bench.time(copy, graph=False).ms for copy in copies)
    return 2 * source.nbytes / copy_ms


def measure(bench: Bench, work: Work, ceilings: Ceilings) -> list[Row]:
    """Rows of one op: forward, and forward + backward or backward alone."""
    torch.manual_seed(bench.seed)
    first = work.inputs()
    sets = [first, *(work.inputs() for _ in range(bench.copies(sum(x.nbytes for x in first)) - 1))]
    run = functools.partial(work.run, backend=bench.backend)
    cotangents = _cotangents(run, first)
    both_calls = [_forward_backward(run, inputs, cotangents) for inputs in sets]
    forward_calls = [_forward(run, inputs) for inputs in sets]
    checks = check(bench, work, first, _several(forward_calls[0]()), cotangents, both_calls[0]())
    both, forward = bench.time(both_calls), bench.time(forward_calls)
    first_row = _row(bench, work, ceilings, Passes.FORWARD, forward, {"o": checks.pop("o")}, sets)
    if work.splits_backward:
        backward = Timing(both.ms - forward.ms, both.method)
        return [first_row, _row(bench, work, ceilings, Passes.BACKWARD, backward, checks, sets)]
    return [first_row, _row(bench, work, ceilings, Passes.BOTH, both, checks, sets)]


def check(
    bench: Bench,
    work: Work,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    found: Sequence[Tensor],
) -> dict[str, Check]:
    """Errors of the outputs and of the gradients `found` against fp64, on the part that `work.cut` takes."""
    floats = [i for i, x in enumerate(inputs) if x.is_floating_point()]
    exact = [
        (work.cut(x.detach(), i).double() if i in floats else work.cut(x, i)).requires_grad_(i in floats)
        for i, x in enumerate(inputs)
    ]
    expected = _several(work.run(*exact, backend="reference"))
    cut_cotangents = [work.cut(x, -1).double() for x in cotangents]
    wanted = torch.autograd.grad(expected, [exact[i] for i in floats], cut_cotangents)
    rounding = 1.0 if bench.dtype == torch.bfloat16 else 1e-5 / max(work.limits.values())
    errors = {"o": max(relative_error(work.cut(a, -1), b) for a, b in zip(outputs, expected, strict=True))}
    for i, name, got, want in zip(floats, work.gradients, found, wanted, strict=True):
        errors[name] = relative_error(work.cut(got, i), want)
    return {name: Check(error, work.limits[name] * rounding) for name, error in errors.items()}


def compiled(bench: Bench, run: Run) -> Run:
    """A baseline by torch.compile."""
    if bench.device.type != "cuda":
        raise NotImplementedError("compiled for a GPU only")
    return _compile(run)


@functools.cache
def _compile(run: Run) -> Run:
    return torch.compile(run, dynamic=False)


def _row(
    bench: Bench,
    work: Work,
    ceilings: Ceilings,
    passes: Passes,
    timing: Timing,
    checks: Mapping[str, Check],
    sets: Sequence[Sequence[Tensor]],
) -> Row:
    which = 0 if passes is Passes.FORWARD else 1
    moved = work.moved[1] - work.moved[0] if passes is Passes.BACKWARD else work.moved[which]
    rates = {
        Quantity.GIGABYTES_PER_SECOND: moved / timing.ms / 1e6,
        Quantity.PERCENT_OF_COPY: 100 * moved / timing.ms / ceilings.bytes_per_ms,
    }
    if work.flops[which]:
        rates[Quantity.TERAFLOPS_PER_SECOND] = work.flops[which] / timing.ms / 1e9
    target = work.targets[which]
    return Row(
        work.operation,
        timing.ms,
        passes=passes,
        sizes=work.sizes,
        method=timing.method,
        target=None if bench.quick or target is None else Target("at most", target),
        floor=ceilings.floor_ms(moved, work.flops[which]),
        baselines={key: _baseline(bench, prepare, sets, passes) for key, prepare in work.baselines.items()},
        checks=checks,
        rates=rates,
        note=work.note,
    )


def _baseline(bench: Bench, prepare: Prepare, sets: Sequence[Sequence[Tensor]], passes: Passes) -> Timing | str:
    def build(passes: Passes) -> list[Callable[[], object]]:
        prepared = [prepare(*inputs) for inputs in sets]
        if passes is Passes.FORWARD:
            return [_forward(run, inputs) for run, inputs in prepared]
        cotangents = _cotangents(*prepared[0])
        return [_forward_backward(run, inputs, cotangents) for run, inputs in prepared]

    timing = bench.baseline(lambda: build(passes))
    if passes is not Passes.BACKWARD or isinstance(timing, str):
        return timing
    forward = bench.baseline(lambda: build(Passes.FORWARD))
    return forward if isinstance(forward, str) else Timing(timing.ms - forward.ms, timing.method)


def _forward(run: Run, inputs: Sequence[Tensor]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return run(*inputs)

    return call


def _forward_backward(run: Run, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Callable[[], Any]:
    return forward_backward(lambda *leaves: _several(run(*leaves)), inputs, grads)


def _cotangents(run: Run, inputs: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [torch.randn_like(x) for x in _several(run(*inputs))]


def _several(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
