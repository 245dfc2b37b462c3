"""Mixers over slices of a sequence are the mixers over the whole, in value and gradient, in fp64.

Every rank computes the whole sequence too, from the same seed, and reports how far its slice is from it. Kernels are slow
in the interpreter: only rank 0 runs them over the whole.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.config import ModelConfig, ParallelConfig
from based_megatron.kernels.exchange import Halo, ReceivedHalo
from based_megatron.kernels.rotary import rotary_tables
from based_megatron.kernels.sliding_window import sliding_window_over_slices
from based_megatron.kernels.taylor_attention import finish_sliced_attention, start_sliced_attention
from based_megatron.model.config import based_config
from based_megatron.model.mixers import MIXERS, MixerInputs, MixerSubmodules
from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.sequence.halos import HaloExchange
from based_megatron.parallel.sequence.plan import SequencePlan, whole_sequence
from based_megatron.parallel.sequence.ranks import ContextRanks
from based_megatron.parallel.sequence.scan import start_gated_sum
from based_megatron.parallel.sequence.states import StateExchange
from based_megatron.parallel.topology import Topology, build_topology
from support.cases import each
from support.pool import rank_device
from support.sequence import flows, gap, on_threads, plan_for, seeded, telling_documents

EXACT = 1e-12
BOUNDS = {
    1: [(0, 9)],
    2: [(0, 1, 2), (0, 3, 10), (0, 8, 9)],
    3: [(0, 1, 2, 3), (0, 8, 16, 24), (0, 2, 3, 11)],
    4: [(0, 1, 2, 3, 4), (0, 8, 16, 24, 32), (0, 1, 7, 9, 17), (0, 9, 10, 11, 12)],
    8: [(0, 1, 2, 3, 4, 5, 6, 7, 8), (0, 3, 4, 8, 9, 10, 17, 18, 22)],
}
"""Slices of one token, even ones, uneven ones; shorter than the window of 5 and the 3 earlier inputs of four taps, and longer."""


def errors_of_sums(bounds: tuple[int, ...], reverse: bool) -> dict[str, float]:
    """Over processes: the sum of the states of other slices, and bytes and calls beside it."""
    topology = build_topology(ParallelConfig(context=dist.get_world_size()), rank_device(dist.get_rank()))
    ranks, ids = topology.sequence, telling_documents(bounds)
    states = seeded(ranks.size, len(ids), 2, 3, seed=1)
    gates = [
        [[float(flows(row, bounds, *((r, p) if reverse else (p, r)))) for row in ids] for p in range(ranks.size)]
        for r in range(ranks.size)
    ]
    expected = torch.einsum("rpb,pb...->rb...", torch.tensor(gates, dtype=torch.float64), states)
    found = start_gated_sum(states[ranks.rank], plan_for(ranks, bounds, ids), reverse=reverse).wait()
    return {"value": gap(found, expected[ranks.rank])}


@pytest.mark.parametrize("size", [2, 4])
def test_sums_over_processes(worker_pool, size):
    cases = [(bounds, reverse) for bounds in BOUNDS[size] for reverse in (False, True)]
    for errors in worker_pool(size).run(each, errors_of_sums, cases):
        assert {case: found for case, found in errors.items() if not found["value"] < EXACT} == {}


def errors_of_algorithms() -> list[float]:
    """Errors of the algorithms over four processes, two to a node."""
    bounds, errors = (0, 1, 7, 9, 17), []
    ids = telling_documents(bounds)
    states = seeded(4, len(ids), 5, seed=1)
    for algorithm, reverse in itertools.product(("all_gather", "two_level", "chain"), (False, True)):
        parallel = ParallelConfig(context=4, state_exchange=algorithm)
        ranks = build_topology(parallel, rank_device(dist.get_rank()), node_ranks=2).sequence
        plan = plan_for(ranks, bounds, ids)
        expected = torch.einsum(
            "bp,pb...->b...",
            (plan.gates.transpose(1, 2) if reverse else plan.gates)[:, ranks.rank].double(),
            states,
        )
        errors.append(gap(start_gated_sum(states[ranks.rank], plan, reverse=reverse).wait(), expected))
    return errors


def test_algorithms_over_processes_agree(worker_pool):
    for errors in worker_pool(4).run(errors_of_algorithms):
        assert len(errors) == 6 and all(error < EXACT for error in errors)


def halo_errors(ranks: ContextRanks, bounds: tuple[int, ...], wanted: int) -> dict[str, float]:
    """Errors of the halo, within its documents, and of its gradient against a slice of the whole."""
    ids, here = telling_documents(bounds), slice(bounds[ranks.rank], bounds[ranks.rank + 1])
    whole = seeded(len(ids), bounds[-1], 2, 3, seed=3).requires_grad_()
    plans = [plan_for(dataclasses.replace(ranks, rank=rank), bounds, ids) for rank in range(ranks.size)]
    cotangents = [
        seeded(len(ids), plan.halo_rows(wanted), 2, 3, seed=10 + rank)
        * (plan.document_ids(wanted)[:, : plan.halo_rows(wanted)] == ids[:, plan.start, None])[..., None, None]  # type: ignore[index]
        for rank, plan in enumerate(plans)
    ]
    parts = [whole[:, plan.start - plan.halo_rows(wanted) : plan.start] for plan in plans]
    total = torch.stack([(part * g).sum() for part, g in zip(parts, cotangents, strict=True)]).sum()
    if total.requires_grad:
        total.backward()
    assert whole.grad is not None
    plan, mine = plans[ranks.rank], whole.detach()[:, here].clone().requires_grad_()
    exchange = HaloExchange(plan, "test", 1, wanted)
    arriving = exchange.start(lambda: mine[:, mine.shape[1] - exchange.boundary_rows :])
    found = ReceivedHalo.apply(mine, Halo(arriving, exchange))
    found.backward(cotangents[ranks.rank])
    needed = cotangents[ranks.rank] != 0
    return {
        "value": gap(found * needed, parts[ranks.rank] * needed),
        "gradient": gap(mine.grad, whole.grad[:, here]),
    }


def halo_errors_of_processes(bounds: tuple[int, ...], wanted: int) -> dict[str, float]:
    parallel = ParallelConfig(context=dist.get_world_size())
    return halo_errors(build_topology(parallel, rank_device(dist.get_rank())).sequence, bounds, wanted)


@pytest.mark.parametrize("wanted", [1, 2, 3, 5, 9, 100])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_a_halo_is_the_tokens_before_the_slice(size, wanted):
    """Shorter than, as long as, and longer than a slice, several slices, and the sequence."""
    for bounds in BOUNDS[size]:
        for errors in on_threads(size, lambda ranks, bounds=bounds: halo_errors(ranks, bounds, wanted)):
            assert all(error < EXACT for error in errors.values()), bounds


def test_halos_over_processes(worker_pool):
    cases = [(bounds, wanted) for bounds in BOUNDS[4] for wanted in (1, 5, 100)]
    for errors in worker_pool(4).run(each, halo_errors_of_processes, cases):
        assert {case: found for case, found in errors.items() if not max(found.values()) < EXACT} == {}


def mixer_errors(
    letter: str,
    cases: list[tuple[int, ...]],
    dtype: torch.dtype = torch.float64,
    backend: str = "reference",
    state_exchange: Any = "auto",
    **model: Any,
) -> dict[str, float]:
    """Errors of a mixer over slices against the same mixer over the whole: output, input gradient, weight gradients."""
    parallel = ParallelConfig(context=dist.get_world_size(), state_exchange=state_exchange)
    topology = build_topology(parallel, rank_device(dist.get_rank()), node_ranks=2)
    device = topology.device
    mixer = small_mixer(letter, topology, parallel, dtype, backend, model)
    errors: dict[str, float] = {}
    for bounds, packed in itertools.product(cases, [False, True]):
        ids = telling_documents(bounds) if packed else None
        x = seeded(bounds[-1], 2 if ids is None else len(ids), 16, seed=20).to(device, dtype)
        cotangent = seeded(*x.shape, seed=21).to(device, dtype)
        plan = plan_for(topology.sequence, bounds, ids, device=device)
        here = slice(plan.start, plan.end)
        over_the_whole = functools.partial(
            run_mixer, mixer, x, cotangent, whole_sequence(plan.documents, len(x), device)
        )
        whole = from_rank_0(over_the_whole, device) if backend == "triton" else over_the_whole()
        mine = run_mixer(mixer, x[here], cotangent[here], plan)
        weights = [name for name in mine if name not in ("output", "input")]
        for name in weights:
            dist.all_reduce(mine[name], group=topology.context.group)
        case = f"slices {bounds}, {'packed' if packed else 'one document'}: "
        parts = {name: whole[name][here] if name in ("output", "input") else whole[name] for name in mine}
        scales = {name: float(whole[name].abs().max()) for name in mine}
        errors |= {case + name: gap(mine[name], part) / scales[name] for name, part in parts.items() if scales[name]}
    return errors


def from_rank_0(compute: Callable[[], dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """What the function returns on rank 0, on every rank."""
    found = [{name: x.cpu() for name, x in compute().items()} if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0, device=device)
    assert found[0] is not None
    return {name: x.to(device) for name, x in found[0].items()}


def small_mixer(
    letter: str, topology: Topology, parallel: ParallelConfig, dtype: torch.dtype, backend: str, model: dict[str, Any]
) -> Any:
    """A small mixer, with the same weights on every rank."""
    settings = ModelConfig(
        layer_pattern=letter, hidden_size=16, ffn_hidden_size=16, num_heads=2, feature_dim=4, window_left=5
    )
    config = based_config(
        dataclasses.replace(settings, **model), parallel, dtype=dtype, backend=backend, recompute="none"
    )
    mixer = MIXERS[letter](config, MixerSubmodules(), 1, topology.process_groups)
    for number, parameter in enumerate(mixer.parameters()):
        parameter.data.copy_(seeded(*parameter.shape, seed=number) / 2)
    return mixer.to(topology.device)


def run_mixer(mixer: Any, x: Tensor, cotangent: Tensor, plan: SequencePlan) -> dict[str, Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    rotary = rotary_tables(torch.arange(plan.start, plan.end, device=x.device), 8, 1.0, 1e4, x.dtype)
    mixer.zero_grad()
    output = mixer(x, inputs=MixerInputs(plan, rotary))[0]
    output.backward(cotangent)
    assert x.grad is not None
    gradients = {name: parameter.grad.clone() for name, parameter in mixer.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **gradients}


MODELS: list[tuple[str, dict[str, int]]] = [
    ("c", {}),
    ("c", {"conv_kernel": 4}),
    ("c", {"conv_kernel": 1}),
    ("L", {}),
    ("S", {}),
    ("S", {"window_left": 0}),
    ("A", {}),
]


@pytest.mark.parametrize("size", BOUNDS)
def test_mixers_over_slices_are_the_mixers_over_the_whole(worker_pool, size):
    cases = [(letter, BOUNDS[size]) for letter, _ in MODELS]
    for results in worker_pool(size).run(each_mixer, cases, [model for _, model in MODELS]):
        for case, errors in results.items():
            assert len(errors) > 2 * 3 * len(BOUNDS[size]), case
            assert {name: error for name, error in errors.items() if not error < EXACT} == {}, case


def each_mixer(cases: list[tuple[Any, ...]], models: list[dict[str, int]]) -> dict[str, dict[str, float]]:
    """mixer_errors of all of them."""
    return {f"{case[0]} {model}": mixer_errors(*case, **model) for case, model in zip(cases, models, strict=True)}


@pytest.mark.parametrize("letter", ["c", "L", "S"])
def test_the_kernels_over_slices_are_the_kernels_over_the_whole(worker_pool, letter):
    """States, halos and their gradients through the Triton kernels, interpreted on a CPU. Several heads are the next test's."""
    run = functools.partial(mixer_errors, num_heads=1)
    for errors in worker_pool(4).run(run, letter, [(0, 1, 4, 22, 23)], torch.float32, "triton"):
        assert {case: error for case, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.parametrize(
    ("letter", "state_exchange"),
    [
        *[("c", "auto"), ("S", "auto")],
        *[pytest.param("L", exchange, marks=pytest.mark.slow) for exchange in ("all_gather", "two_level", "chain")],
    ],
)
def test_two_ranks_with_kernels(worker_pool, letter, state_exchange):
    """The two GPUs that a machine may have exchange over NCCL, on streams of their own."""
    run = functools.partial(mixer_errors, state_exchange=state_exchange)
    for errors in worker_pool(2).run(run, letter, [(0, 5, 21)], torch.float32, "triton"):
        assert {case: error for case, error in errors.items() if not error < 1e-5} == {}


class Ranks(torch.autograd.Function):
    """All ranks' programs as one function of all their inputs: each runs, and is run backward, in a thread of its own."""

    @staticmethod
    def forward(ctx: Any, run: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            share = len(inputs) // run.size
            outputs = on_threads(
                run.size,
                lambda ranks: run.program(ranks, *leaves[ranks.rank * share : (ranks.rank + 1) * share]),
                run.algorithm,
                run.node_ranks,
            )
        ctx.leaves, ctx.outputs, ctx.share = leaves, outputs, share
        return tuple(x.detach() for x in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        def program(ranks: ContextRanks) -> list[Tensor]:
            mine = ctx.leaves[ranks.rank * ctx.share : (ranks.rank + 1) * ctx.share]
            return list(torch.autograd.grad(ctx.outputs[ranks.rank], mine, grads[ranks.rank], retain_graph=True))

        found = on_threads(len(ctx.outputs), program)
        return None, *itertools.chain.from_iterable(found)


@dataclasses.dataclass(frozen=True)
class Programs:
    """What `Ranks` runs."""

    size: int
    program: Any
    algorithm: Any = "auto"
    node_ranks: int = 0


GRADCHECK_BOUNDS = (0, 2, 3, 5, 6)
GRADCHECK_IDS = torch.tensor([[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]], dtype=torch.int32)


def slice_inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    """For each rank, tensors [B, L, *shape]."""
    lengths = [end - start for start, end in itertools.pairwise(GRADCHECK_BOUNDS)]
    rows = len(GRADCHECK_IDS)
    return [
        seeded(rows, length, *shape, seed=10 * rank + i).requires_grad_()
        for rank, length in enumerate(lengths)
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize(("algorithm", "node_ranks"), [("all_gather", 0), ("two_level", 2), ("chain", 0)])
def test_gradcheck_of_attention_over_slices(algorithm, node_ranks):
    def program(ranks: ContextRanks, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan = plan_for(ranks, GRADCHECK_BOUNDS, GRADCHECK_IDS)
        started = start_sliced_attention(k, v, StateExchange(plan, 1), document_ids_BL=plan.document_ids())
        return finish_sliced_attention(q, k, v, started)

    run = Programs(4, program, algorithm, node_ranks)
    assert torch.autograd.gradcheck(lambda *x: Ranks.apply(run, *x), slice_inputs((1, 2), (1, 2), (1, 2)))


def test_gradcheck_of_windows_over_slices():
    def program(ranks: ContextRanks, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan = plan_for(ranks, GRADCHECK_BOUNDS, GRADCHECK_IDS)
        exchange = HaloExchange(plan, "window", 1, 3)
        arriving = exchange.start(lambda: torch.stack([k, v], dim=2)[:, k.shape[1] - exchange.boundary_rows :])
        ids = plan.document_ids(3)
        return sliding_window_over_slices(q, k, v, Halo(arriving, exchange), window_left=3, key_document_ids_BS=ids)

    run = Programs(4, program)
    assert torch.autograd.gradcheck(lambda *x: Ranks.apply(run, *x), slice_inputs((1, 2), (1, 2), (1, 2)))


def test_the_state_of_a_slice_is_not_computed_where_nobody_needs_it():
    """No document crosses: no rank asks for moments, and none waits for another."""
    ids = torch.tensor([[0, 0, 1, 1]], dtype=torch.int32)

    def never() -> Tensor:
        raise AssertionError("asked for moments")

    for ranks in (ContextRanks(0, 2), ContextRanks(1, 2)):
        exchange = StateExchange(plan_for(ranks, (0, 2, 4), ids), 1)
        assert exchange.start_prefix(never).wait() is None and exchange.start_suffix(never).wait() is None


def test_pending_is_waited_for_once():
    times: list[int] = []
    pending = Pending(lambda: times.append(1) or 5).then(lambda x: x + 1)
    assert pending.wait() == pending.wait() == 6 and times == [1]


def test_ranks_as_threads_match_messages_in_the_order_they_were_posted_in():
    """As NCCL and gloo do, in whatever order they are waited for."""

    def program(ranks: ContextRanks) -> list[float]:
        channel, buffers = ranks.halos, [torch.zeros(1), torch.zeros(1)]
        assert channel is not None
        if ranks.rank == 0:
            for number in (1.0, 2.0):
                channel.exchange("halo", [(1, torch.full((1,), number))], []).wait()
            return []
        first, second = (channel.exchange("halo", [], [(0, buffer)]) for buffer in buffers)
        second.wait()
        first.wait()
        return [float(buffer) for buffer in buffers]

    assert on_threads(2, program)[1] == [1.0, 2.0]
