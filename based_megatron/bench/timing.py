"""Timing on a device: medians after warm-up, over inputs taken in turn, by CUDA events or replayed CUDA graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from based_megatron.bench.keys import Method

Call = Callable[[], object]
Found = TypeVar("Found")

GRAPH_MS = 2.0
"""A graph holds as many calls as fill this time: the gaps at its ends and the events' resolution then do not count."""


@dataclass(frozen=True)
class Timing:
    """Median time of one call."""

    ms: float
    method: Method


@dataclass(frozen=True)
class Bench:
    """Settings of a benchmark: device, sizes, dtype; passed to every case."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    """Kernels of ours to time, resolved."""
    quick: bool = False
    """Tiny sizes, that a CPU can run: shows that everything works, not how fast it is."""
    seed: int = 0

    def random(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Fresh normal numbers, drawn on the device."""
        return torch.randn(*shape, device=self.device, dtype=torch.float32).mul_(scale).to(dtype or self.dtype)

    def size(self, full: int, quick: int) -> int:
        """The full size, or the one of a quick run."""
        return quick if self.quick else full

    def copies(self, bytes_of_one: int) -> int:
        """Sets of inputs to take in turn, so that together they are four times the L2 cache."""
        if self.device.type != "cuda":
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, min(16, -(-4 * cache // max(1, bytes_of_one))))

    def time(self, calls: Sequence[Call] | Call, *, graph: bool = True, budget_ms: float = 100.0) -> Timing:
        """Median time of one of `calls`, which do the same work on different inputs.

        graph: replay CUDA graphs of the calls, so that launches cost nothing; where a call cannot be captured, time
        it by events (the method is in the result). budget_ms: time to spend on measuring.
        """
        calls = [calls] if callable(calls) else list(calls)
        if self.device.type != "cuda":
            return Timing(_clock(calls, 1 if self.quick else 5), Method.CLOCK)
        if graph and not _waits(calls[0]):
            try:
                return Timing(_graph(calls, budget_ms), Method.GRAPH)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception:
                # Timing by events runs the calls again: an error of their own is raised there.
                torch.cuda.synchronize()
                _new_generator(self.device)
        return Timing(_events(calls, budget_ms), Method.EVENTS)

    def baseline(
        self, build: Callable[[], Sequence[Call] | Call], *, graph: bool = True, budget_ms: float = 100.0
    ) -> Timing | str:
        """Time what `build` returns, or say why there is no time: a baseline that is missing or fails is never an error."""
        return attempt(lambda: self.time(build(), graph=graph, budget_ms=budget_ms))


def attempt(run: Callable[[], Found]) -> Found | str:
    """Result of a baseline's run, or the reason why there is none."""
    try:
        return run()
    except ImportError:
        return "not installed"
    except NotImplementedError as error:
        return str(error)
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def forward_backward(run: Callable[..., Any], inputs: Sequence[Tensor], grads: Any) -> Callable[[], Any]:
    """A call that runs `run(*inputs)` and its backward pass; gradients are returned, not accumulated."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]

    def call() -> Any:
        return torch.autograd.grad(run(*leaves), wanted, grads)

    return call


def _waits(call: Call) -> bool:
    """True if a call waits for the GPU (`.item()`), so that it cannot be captured. The first call may compile: it does not count."""
    call()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _new_generator(device: torch.device) -> None:
    """A capture that failed leaves the default generator waiting for its end: every later random number would raise."""
    fresh = torch.Generator(device)
    fresh.manual_seed(0)
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.default_generators[index].graphsafe_set_state(fresh)


def _graph(calls: Sequence[Call], budget_ms: float) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    once_ms = _elapsed(lambda: [call() for call in calls]) / len(calls)
    rounds = max(1, min(64, round(GRAPH_MS / max(once_ms * len(calls), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    per_replay = rounds * len(calls)
    graph.replay()
    replay_ms = _elapsed(graph.replay)
    repeats = int(min(50, max(5, budget_ms / max(replay_ms, 1e-3))))
    return statistics.median(_elapsed(graph.replay) for _ in range(repeats)) / per_replay


def _events(calls: Sequence[Call], budget_ms: float) -> float:
    for _ in range(3):
        for call in calls:
            call()
    once_ms = max(_elapsed(calls[0]), 1e-3)
    # Calls follow each other without waiting, as in use: one that is shorter than its launch is timed as its launch.
    repeats = int(min(200, max(5, budget_ms / once_ms)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for i in range(repeats):
        calls[i % len(calls)]()
        marks[i + 1].record()
    torch.cuda.synchronize()
    return statistics.median(marks[i].elapsed_time(marks[i + 1]) for i in range(repeats))


def _elapsed(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _clock(calls: Sequence[Call], repeats: int) -> float:
    calls[0]()
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        calls[i % len(calls)]()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
