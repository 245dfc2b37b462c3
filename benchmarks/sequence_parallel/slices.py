"""Checks of mixers over slices against the whole sequence in fp64: all ranks of a sequence run on one device, as threads.

Legend: B sequences, S tokens of the whole sequence, L tokens of a slice, P ranks, H heads, F feature dim, V value head dim,
W window_left, D channels, K taps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from based_megatron.bench.keys import Sizes
from based_megatron.bench.report import Check, relative_error
from based_megatron.bench.timing import Bench
from based_megatron.kernels.exchange import Halo
from based_megatron.kernels.gated_conv import gated_conv_fused, gated_conv_over_slices
from based_megatron.kernels.sliding_window import sliding_window_attention, sliding_window_over_slices
from based_megatron.kernels.taylor_attention import finish_sliced_attention, start_sliced_attention, taylor_attention
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.halos import HaloExchange
from based_megatron.parallel.sequence.in_process import in_process_ranks, run_ranks
from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.sequence.ranks import Algorithm, ContextRanks
from based_megatron.parallel.sequence.slices import even_bounds
from based_megatron.parallel.sequence.states import StateExchange
from benchmarks.sequence_parallel.absent_ranks import among_absent_ranks
from benchmarks.sequence_parallel.results import Layer, SliceCheck, Way
from benchmarks.sequence_parallel.traffic import LayerTraffic

ALGORITHMS: dict[Way, Algorithm] = {
    Way.ALL_GATHER: "all_gather",
    Way.TWO_LEVEL: "two_level",
    Way.CHAIN: "chain",
}
"""Ways to sum states that we have code for."""
FP32_LIMIT = 1e-5
PADDING = 1e-2
"""Share of the bytes by which two levels pad a state, to give each rank of a node as many numbers."""


@dataclass(frozen=True)
class Operation:
    """A mixer's operation over the whole sequence and over one slice of it."""

    layer: Layer
    sizes: Sizes
    inputs: Callable[[], list[Tensor]]
    """Fresh random inputs; those that `shared` names are whole on every rank, others are [B, S, ...]."""
    whole: Callable[..., Tensor]
    """(*inputs, ids of the documents [B, S]) to the output [B, S, ...], in fp64."""
    slice: Callable[..., Tensor]
    """(*inputs of a slice, its plan) to the output of the slice."""
    limits: dict[str, float]
    """Largest relative L2 errors in bf16, of `o` and of the gradient of each input."""
    sent_bytes: Callable[[int, Way], float]
    """(P, way) to what a rank between others sends of one sequence in one pass (traffic.py)."""
    shared: frozenset[int] = frozenset()


def operations(bench: Bench, S: int, heads: int) -> dict[Layer, Operation]:
    """The operation of each layer."""
    B, F, V, W = 2, bench.size(16, 4), bench.size(112, 8), bench.size(128, 5)
    D, K = bench.size(3584, 16), 3
    backend = bench.backend

    def attend(q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan) -> Tensor:
        ids = plan.document_ids()
        started = start_sliced_attention(k, v, StateExchange(plan, 1), document_ids_BL=ids, backend=backend)
        return finish_sliced_attention(q, k, v, started)

    def slide(q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan) -> Tensor:
        exchange = HaloExchange(plan, "window", 1, W)
        arriving = exchange.start(lambda: torch.stack([k, v], dim=2)[:, k.shape[1] - exchange.boundary_rows :])
        return sliding_window_over_slices(
            q, k, v, Halo(arriving, exchange),
            window_left=W, key_document_ids_BS=plan.document_ids(W), backend=backend,
        )  # fmt: skip

    def convolve(projected: Tensor, weight: Tensor, plan: SequencePlan) -> Tensor:
        exchange = HaloExchange(plan, "conv", 1, K - 1)
        arriving = exchange.start(lambda: projected[:, projected.shape[1] - exchange.boundary_rows :, :D])
        ids = plan.document_ids(K - 1)
        return gated_conv_over_slices(
            projected, weight, Halo(arriving, exchange), key_document_ids_BS=ids, backend=backend
        )

    traffic = LayerTraffic("", heads, F, V, W, D, K, bench.dtype.itemsize)

    def state_bytes(P: int, way: Way) -> float:
        if way is Way.TWO_LEVEL:
            return sum(traffic.two_level_bytes(P, P // 2))
        return traffic.state_bytes if way is Way.CHAIN else traffic.all_gather_bytes(P, traffic.state_bytes)

    attention_limits = {"o": 3e-3, "dq": 5e-3, "dk": 4e-3, "dv": 4e-3}
    return {
        Layer.LINEAR_ATTENTION: Operation(
            Layer.LINEAR_ATTENTION,
            Sizes(batch=B, tokens=S, heads=heads, feature_dim=F, head_dim=V),
            lambda: [bench.random(B, S, heads, n) for n in (F, F, V)],
            lambda q, k, v, ids: taylor_attention(q, k, v, document_ids_BT=ids)[0],
            attend,
            attention_limits,
            state_bytes,
        ),
        Layer.SLIDING_WINDOW: Operation(
            Layer.SLIDING_WINDOW,
            Sizes(batch=B, tokens=S, heads=heads, head_dim=V, window_left=W),
            lambda: [bench.random(B, S, heads, V) for _ in range(3)],
            lambda q, k, v, ids: sliding_window_attention(q, k, v, window_left=W, key_document_ids_BS=ids),
            slide,
            attention_limits,
            lambda P, _: traffic.window_halo_bytes,
        ),
        Layer.GATED_CONV: Operation(
            Layer.GATED_CONV,
            Sizes(batch=B, tokens=S, channels=D, taps=K),
            lambda: [bench.random(B, S, 2 * D), bench.random(D, K)],
            lambda projected, weight, ids: gated_conv_fused(projected, weight, key_document_ids_BS=ids),
            convolve,
            {"o": 3e-3, "dprojected": 4e-3, "dweight": 4e-3},
            lambda P, _: traffic.conv_halo_bytes,
            shared=frozenset({1}),
        ),
    }


def slice_checks(bench: Bench) -> list[SliceCheck]:
    """Checks of every mixer over 4 and 8 slices, with every algorithm of the state, and of a long sequence."""
    S, heads = bench.size(4096, 64), bench.size(16, 2)
    found = operations(bench, S, heads)
    cases: list[tuple[Operation, int, Way]] = []
    for P in (4, 8):
        cases += [(found[Layer.LINEAR_ATTENTION], P, way) for way in ALGORITHMS]
        cases += [(found[layer], P, Way.HALO) for layer in (Layer.SLIDING_WINDOW, Layer.GATED_CONV)]
    long = operations(bench, bench.size(131072, 96), 1)[Layer.LINEAR_ATTENTION]
    return [check_slices(bench, *case) for case in [*cases, (long, 8, Way.ALL_GATHER)]]


def check_slices(bench: Bench, operation: Operation, P: int, way: Way) -> SliceCheck:
    """Errors of the outputs and gradients of all ranks together, and what they sent over the formula of traffic.py."""
    torch.manual_seed(bench.seed)
    inputs = operation.inputs()
    S = inputs[0].shape[1]
    step = bench.size(16, 1)
    bounds = uneven_bounds(S, P, step)
    ids = packed_documents(bounds).to(bench.device)
    exact = [x.double().requires_grad_() for x in inputs]
    expected = operation.whole(*exact, ids)
    cotangent = bench.random(*expected.shape)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    documents = Documents.from_ids(ids)
    if bench.device.type == "cuda":
        # Kernels are compiled here, once, and not by every thread.
        for rank in range(P):
            run_slice(operation, among_absent_ranks(rank, P, "all_gather"), bounds, documents, inputs, cotangent)
    places = in_process_ranks(P, ALGORITHMS.get(way, "auto"), node_ranks=P // 2 if way is Way.TWO_LEVEL else 0)

    def program(rank: int) -> tuple[Tensor, list[Tensor]]:
        return run_slice(operation, places[rank], bounds, documents, inputs, cotangent)

    parts = run_ranks(P, program)
    names = list(operation.limits)
    errors = {names[0]: relative_error(torch.cat([o for o, _ in parts], dim=1), expected)}
    for i, name in enumerate(names[1:]):
        of_ranks = [gradients[i] for _, gradients in parts]
        whole = torch.stack(of_ranks).double().sum(0) if i in operation.shared else torch.cat(of_ranks, dim=1)
        errors[name] = relative_error(whole, wanted[i])
    rounding = 1.0 if bench.dtype == torch.bfloat16 else FP32_LIMIT / max(operation.limits.values())
    checks = {name: Check(error, operation.limits[name] * rounding) for name, error in errors.items()}
    sent = max(sum(place.traffic.sent_bytes.values()) for place in places)
    formula = 2 * inputs[0].shape[0] * operation.sent_bytes(P, way)
    checks["bytes"] = Check(abs(sent / formula - 1), PADDING)
    return SliceCheck(operation.layer, way, P, operation.sizes, checks, sent / 1e3)


def run_slice(
    operation: Operation, ranks: ContextRanks, bounds: tuple[int, ...], documents: Documents,
    inputs: Sequence[Tensor], cotangent: Tensor,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """(output, gradients) of one rank's slice."""
    plan = SequencePlan(ranks, bounds, documents, inputs[0].device)
    here = slice(plan.start, plan.end)
    mine = [
        (x if i in operation.shared else x[:, here]).detach().clone().requires_grad_() for i, x in enumerate(inputs)
    ]
    # In the thread of the rank: otherwise one thread of autograd's runs all ranks' backward passes, and waits in the first.
    with torch.autograd.set_multithreading_enabled(False):
        output: Any = operation.slice(*mine, plan)
        return output.detach(), list(torch.autograd.grad(output, mine, cotangent[:, here]))


def uneven_bounds(S: int, P: int, step: int) -> tuple[int, ...]:
    """Bounds of slices that differ by a few steps of `step` tokens."""
    even = even_bounds(S, P, step)
    return tuple(b + step * (i % 3) * (0 < i < P) for i, b in enumerate(even))


def packed_documents(bounds: tuple[int, ...]) -> Tensor:
    """Ids of documents [2, S]: one document over all slices; documents that begin on a boundary, inside slices, and last one token."""
    S = bounds[-1]
    starts = sorted({bounds[1], bounds[2] + 3, bounds[2] + 4, (bounds[-2] + S) // 2, S - 1})
    changes = torch.zeros(2, S, dtype=torch.int32)
    changes[1, starts] = 1
    return changes.cumsum(1, dtype=torch.int32)
