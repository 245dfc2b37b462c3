"""One kernel under test: checked against the reference in fp64, then timed, forward and backward, beside its peers.

What is checked is what is timed: outputs and gradients of the first set of inputs, compared on a few heads, channels or tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from based_megatron.bench.report import Check, Row, Target, relative_error
from based_megatron.bench.timing import Bench, Timing, forward_backward

Run = Callable[..., Any]
Peer = Callable[..., tuple[Run, Sequence[Tensor]]]
"""From our inputs to a peer's function and its inputs."""


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, measured in the same run."""

    bytes_per_ms: float
    flops_per_ms: float

    def floor_ms(self, moved: float, flops: float = 0.0) -> float:
        """The larger of the two times."""
        return max(moved / self.bytes_per_ms, flops / self.flops_per_ms)


@dataclass(frozen=True)
class Work:
    """One op at one size."""

    name: str
    shape: str
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
    peers: Mapping[str, Peer] = field(default_factory=dict)
    splits_backward: bool = False
    """Report backward alone: forward + backward less forward."""


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
    names = (f"{work.name} forward", f"{work.name} forward + backward")
    rows = [
        _row(bench, work, ceilings, names[0], 0, forward, {"o": checks.pop("o")}, sets),
        _row(bench, work, ceilings, names[1], 1, both, checks, sets),
    ]
    if work.splits_backward:
        moved = work.moved[1] - work.moved[0]
        backward = Timing(both.ms - forward.ms, both.method)
        rows[1] = _row(bench, work, ceilings, f"{work.name} backward", 1, backward, checks, sets, moved)
    return rows


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
    """A peer by torch.compile."""
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
    name: str,
    which: int,
    timing: Timing,
    checks: Mapping[str, Check],
    sets: Sequence[Sequence[Tensor]],
    moved: float | None = None,
) -> Row:
    moved = work.moved[which] if moved is None else moved
    rates = {"GB/s": moved / timing.ms / 1e6, "% of copy": 100 * moved / timing.ms / ceilings.bytes_per_ms}
    if work.flops[which]:
        rates["TFLOP/s"] = work.flops[which] / timing.ms / 1e9
    target = work.targets[which]
    alone = work.splits_backward and which == 1
    return Row(
        name,
        work.shape,
        timing.ms,
        target=None if bench.quick or target is None else Target("at most", target),
        floor=ceilings.floor_ms(moved, work.flops[which]),
        peers={peer: _peer(bench, prepare, sets, which, alone) for peer, prepare in work.peers.items()},
        checks=checks,
        rates=rates,
        note="timed by events" if timing.method == "events" else "",
    )


def _peer(bench: Bench, prepare: Peer, sets: Sequence[Sequence[Tensor]], which: int, alone: bool) -> Timing | str:
    def build(which: int) -> list[Callable[[], object]]:
        prepared = [prepare(*inputs) for inputs in sets]
        if not which:
            return [_forward(run, inputs) for run, inputs in prepared]
        cotangents = _cotangents(*prepared[0])
        return [_forward_backward(run, inputs, cotangents) for run, inputs in prepared]

    timing = bench.peer(lambda: build(which))
    if not alone or isinstance(timing, str):
        return timing
    forward = bench.peer(lambda: build(0))
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
