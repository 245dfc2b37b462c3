"""Messages, exchanges and operations of steps with carried states equal those of one long sequence, in value and gradient.

Ranks run as threads; whole models are in test_carried_steps.py. Cases of a single step are long sequences [B, PAST + S], whose
last S tokens are the step's.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from based_megatron.kernels.exchange import Halo, ReceivedHalo
from based_megatron.kernels.gated_conv import gated_conv_fused, gated_conv_over_slices
from based_megatron.kernels.sliding_window import sliding_window_attention, sliding_window_over_slices
from based_megatron.kernels.taylor_attention import finish_sliced_attention, start_sliced_attention, taylor_attention
from based_megatron.parallel.sequence.carried import CarriedState, NothingCarried, Past
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.halos import HaloExchange
from based_megatron.parallel.sequence.in_process import in_process_ranks
from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.sequence.ranks import ContextRanks
from based_megatron.parallel.sequence.states import STATE, StateExchange
from support.sequence import CPU, documents_of_part, flows, gap, on_threads, seeded, spoil_what_has_ended

EXACT = 1e-12
PAST = 7
BOUNDS = [
    (0, 9),
    (0, 1, 2),
    (0, 3, 10),
    (0, 8, 9),
    (0, 2, 3, 11),
    (0, 1, 2, 3, 4),
    (0, 1, 7, 9, 17),
    (0, 9, 10, 11, 12),
]
ALGORITHMS: list[tuple[Any, int]] = [("all_gather", 0), ("chain", 0), ("two_level", 2)]


def telling_ids(bounds: tuple[int, ...]) -> Tensor:
    """Ids [B, PAST + S] with the starts that matter where a step begins and ends."""
    total = PAST + bounds[-1]
    starts: list[list[int]] = [
        [],  # one document over both steps
        [PAST],  # begins with this step
        [PAST - 1],  # with the last token of the step before
        [PAST - 3, PAST + bounds[1]],  # goes on in the first slice alone
        [PAST - 2, PAST + bounds[1] - 1],  # and ends before that slice's last token
        [PAST + bounds[-2]],  # begins with the last slice
        [total - 1],  # the last token begins one
        list(range(1, total)),
    ]
    ids = torch.zeros(len(starts), total, dtype=torch.int32)
    for row, places in enumerate(starts):
        for place in {place for place in places if place < total}:
            ids[row, place:] += 1
    return ids


def plan_of_part(
    ranks: ContextRanks, bounds: tuple[int, ...], ids: Tensor, carried: CarriedState | None = None
) -> SequencePlan:
    documents = documents_of_part(ids, PAST, PAST + bounds[-1])
    return SequencePlan(ranks, bounds, documents, CPU, CarriedState() if carried is None else carried)


def long_bounds(bounds: tuple[int, ...]) -> tuple[int, ...]:
    """Positions in the long sequence of slices -1 .. P - 1, and the last token's as the start of slice P."""
    return (0, *(PAST + bound for bound in bounds))


def flows_between(ids: Tensor, bounds: tuple[int, ...]) -> list[list[list[float]]]:
    """[b, r, p], both from -1 on, written out. The next step goes on with the document of the last token."""
    size, edges = len(bounds) - 1, long_bounds(bounds)
    longer = torch.cat([ids, ids[:, -1:]], dim=1)
    numbers = range(size + 2)
    return [[[float(p < r and flows(row, edges, p, r)) for p in numbers] for r in numbers] for row in longer]


@pytest.mark.parametrize("bounds", BOUNDS)
def test_gates_have_the_step_before_as_a_source_and_the_next_as_a_target(bounds):
    ids, (ranks, *_) = telling_ids(bounds), in_process_ranks(len(bounds) - 1)
    plan = plan_of_part(ranks, bounds, ids)
    assert plan.gates.tolist() == flows_between(ids, bounds)
    apart = dataclasses.replace(plan, carried=NothingCarried())
    assert torch.equal(plan.rank_gates, apart.gates) and torch.equal(plan.device_rank_gates, apart.device_gates)


@st.composite
def steps(draw):
    """(bounds, ids [B, PAST + S])."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    bounds = tuple(itertools.accumulate([0, *lengths]))
    length, rows = PAST + bounds[-1], draw(st.integers(1, 3))
    changes = draw(
        st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=rows, max_size=rows)
    )
    return bounds, (torch.tensor(changes) == 3).int().cumsum(1).int()


@settings(max_examples=150, deadline=None)
@given(steps(), st.integers(1, PAST))
def test_messages_bring_what_a_token_of_this_step_or_the_next_may_see(case, rows):
    bounds, ids = case
    size, length = len(bounds) - 1, bounds[-1]
    for rank, ranks in enumerate(in_process_ranks(size)):
        plan = plan_of_part(ranks, bounds, ids)
        for reader in {rank, size} if rank == 0 else {rank}:
            start = bounds[reader]
            received = [p for m in plan.messages(rows) if m.reader == reader for p in range(m.first, m.last)]
            # The next step may go on with the document of the last token.
            seen_by = PAST + min(start, length - 1)
            visible = {
                p
                for p in range(start - rows, start)
                for row in ids
                if len(set(row[PAST + p : seen_by + 1].tolist())) == 1
            }
            assert len(received) == len(set(received)) and visible <= set(received) <= set(range(start - rows, start))
        assert plan.halo_rows(rows) == max(
            [bounds[rank] - m.first for m in plan.halo_messages(rows) if m.reader == rank], default=0
        )
        gates = flows_between(ids, bounds)
        for m in plan.messages(rows):
            assert m.first < m.last <= bounds[m.owner + 1] and (m.owner < 0 or bounds[m.owner] <= m.first)
            # Nothing is sent that no document needs; rows of the step before are needed where those of the first slice are.
            source = plan.holder(m.owner)
            assert source == plan.holder(m.reader) or any(of_row[m.reader + 1][source + 1] for of_row in gates)


SHIFT = 100.0
"""By how much rows in the words of the step before are off, for `renew` to undo."""


def halo_errors(ranks: ContextRanks, bounds: tuple[int, ...], wanted: int) -> dict[str, float]:
    """Errors of the halo and of what is left for the next step, within their documents, and of the gradient."""
    ids, total = telling_ids(bounds), PAST + bounds[-1]
    padded = torch.cat(
        [torch.zeros(len(ids), 100, 2, 3, dtype=torch.float64), seeded(len(ids), total, 2, 3, seed=3)], 1
    )
    past = 100 + PAST
    before = {("test", 1): padded[:, past - wanted : past] + SHIFT} if ranks.rank == 0 else {}
    plan = plan_of_part(ranks, bounds, ids, CarriedState(before))
    exchange = HaloExchange(plan, "test", 1, wanted, renew=lambda rows: rows - SHIFT)

    plans = [dataclasses.replace(plan, ranks=dataclasses.replace(ranks, rank=rank)) for rank in range(ranks.size)]
    whole, cotangents = padded.clone().requires_grad_(), []
    for rank, of_rank in enumerate(plans):
        halo, start = of_rank.halo_rows(wanted), PAST + of_rank.start
        same = torch.zeros(len(ids), halo, dtype=torch.bool)
        known = min(halo, start)
        same[:, halo - known :] = ids[:, start - known : start] == ids[:, start, None]
        cotangents.append(seeded(len(ids), halo, 2, 3, seed=10 + rank) * same[..., None, None])
        (whole[:, 100 + start - halo : 100 + start] * cotangents[-1]).sum().backward()
    assert whole.grad is not None

    here = slice(past + plan.start, past + plan.end)
    mine = padded[:, here].clone().requires_grad_()
    found = ReceivedHalo.apply(
        mine, Halo(exchange.start(lambda: mine[:, mine.shape[1] - exchange.boundary_rows :]), exchange)
    )
    found.backward(cotangents[ranks.rank])
    needed = cotangents[ranks.rank] != 0
    expected = padded[:, past + plan.start - exchange.rows : past + plan.start]
    errors = {"value": gap(found * needed, expected * needed), "gradient": gap(mine.grad, whole.grad[:, here])}

    after = plan.carried.next(bounds[-1]).before
    assert (("test", 1) in after) == (ranks.rank == 0)
    if ranks.rank == 0:
        seen = torch.zeros(len(ids), wanted, dtype=torch.bool)
        known = min(wanted, total)
        seen[:, wanted - known :] = ids[:, total - known :] == ids[:, -1:]
        expected = padded[:, 100 + total - wanted : 100 + total]
        errors["next"] = gap(after["test", 1] * seen[..., None, None], expected * seen[..., None, None])
    return errors


@pytest.mark.parametrize("wanted", [1, 2, 3, 5, 9, 30])
def test_halos_come_from_the_step_before_and_go_to_the_next(wanted):
    """Shorter and longer than slices, than the sequence and than the step before; gradients stop at the step."""
    for bounds in BOUNDS:
        for errors in on_threads(len(bounds) - 1, lambda ranks, bounds=bounds: halo_errors(ranks, bounds, wanted)):
            assert all(error < EXACT for error in errors.values()), (bounds, errors)


def state_errors(ranks: ContextRanks, bounds: tuple[int, ...]) -> dict[str, float]:
    """Errors of the state before the slice and of the one after the sequence, against sums written out."""
    ids, size = telling_ids(bounds), ranks.size
    gates = torch.tensor(flows_between(ids, bounds), dtype=torch.float64)
    # One state for each of the slices -1 .. P - 1.
    states = seeded(size + 1, len(ids), 2, 3, 5, seed=1)
    expected = torch.einsum("brp,pbhij->rbhij", gates[:, :, :-1], states)
    carried = CarriedState({(STATE, 1): states[0]} if ranks.rank == 0 else {})
    plan = plan_of_part(ranks, bounds, ids, carried)
    found = StateExchange(plan, 1).start_prefix(lambda: states[ranks.rank + 1]).wait()
    errors = {"prefix": gap(found, expected[ranks.rank + 1])}
    after = carried.next(bounds[-1]).before
    assert ((STATE, 1) in after) == (ranks.rank == 0)
    if ranks.rank == 0:
        errors["next"] = gap(after[STATE, 1], expected[size + 1])
    return errors


@pytest.mark.parametrize(("algorithm", "node_ranks"), ALGORITHMS)
def test_states_come_from_the_step_before_and_go_to_the_next(algorithm, node_ranks):
    for bounds in BOUNDS:
        size = len(bounds) - 1
        if size == 1 or not node_ranks or size % node_ranks == 0:
            program = lambda ranks, bounds=bounds: state_errors(ranks, bounds)  # noqa: E731
            for errors in on_threads(size, program, algorithm, node_ranks if size > 1 else 0):
                assert all(error < EXACT for error in errors.values()), (bounds, errors)


def test_a_step_that_carries_moves_rows_and_states_once_from_the_last_rank_to_the_first():
    bounds, wanted = (0, 4, 8, 12, 16), 3
    ids = torch.zeros(2, PAST + 16, dtype=torch.int32)

    def program(ranks: ContextRanks) -> tuple[int, int, int]:
        plan = plan_of_part(ranks, bounds, ids)
        HaloExchange(plan, "test", 1, wanted).start(lambda: seeded(2, wanted, 5, seed=1)).wait()
        StateExchange(plan, 1).start_prefix(lambda: seeded(2, 7, seed=2)).wait()
        plan.carried.next(16)
        counted = ranks.traffic
        return counted.calls["carried"], counted.sent_bytes["carried"], counted.received_bytes["carried"]

    moved = 8 * (2 * wanted * 5 + 2 * 7)
    assert on_threads(4, program) == [(2, 0, moved), (0, 0, 0), (0, 0, 0), (2, moved, 0)]


def test_a_second_pass_that_recomputes_leaves_the_carried_state_alone():
    ids, carried = torch.zeros(1, PAST + 4, dtype=torch.int32), CarriedState({(STATE, 1): seeded(1, 3, seed=1)})
    (ranks,) = in_process_ranks(1)
    exchange = StateExchange(plan_of_part(ranks, (0, 4), ids, carried), 1, keep=True)
    first = exchange.start_prefix(lambda: seeded(1, 3, seed=2)).wait()
    after = carried.after[STATE, 1]
    again = exchange.start_prefix(lambda: seeded(1, 3, seed=3)).wait()
    assert again is first and carried.after[STATE, 1] is after


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation over whole sequences, the oracle, and over one slice of a step."""

    inputs: tuple[tuple[int, ...], ...]
    """Shape of each input behind [B, S]."""
    whole: Callable[..., Tensor]
    """(*inputs, document ids [B, S]) -> output."""
    slice: Callable[..., Tensor]
    """(*inputs of the slice, its plan) -> output of the slice."""


WINDOW, TAPS, CHANNELS = 9, 4, 3
"""The window is wider than a step of 7 tokens: its keys come from two steps before."""
CONV_WEIGHT = seeded(CHANNELS, TAPS, seed=9)


def attend_slice(q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan) -> Tensor:
    started = start_sliced_attention(k, v, StateExchange(plan, 1), document_ids_BL=plan.document_ids())
    return finish_sliced_attention(q, k, v, started)


def slide_slice(q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan) -> Tensor:
    exchange = HaloExchange(plan, "window", 1, WINDOW)
    arriving = exchange.start(lambda: torch.stack([k, v], dim=2)[:, k.shape[1] - exchange.boundary_rows :])
    ids = plan.document_ids(WINDOW)
    return sliding_window_over_slices(q, k, v, Halo(arriving, exchange), window_left=WINDOW, key_document_ids_BS=ids)


def convolve_slice(projected: Tensor, plan: SequencePlan) -> Tensor:
    exchange = HaloExchange(plan, "conv", 1, TAPS - 1)
    arriving = exchange.start(lambda: projected[:, projected.shape[1] - exchange.boundary_rows :, :CHANNELS])
    ids = plan.document_ids(TAPS - 1)
    return gated_conv_over_slices(projected, CONV_WEIGHT, Halo(arriving, exchange), key_document_ids_BS=ids)


OPERATIONS = {
    "linear attention": Operation(
        ((2, 3), (2, 3), (2, 5)),
        lambda q, k, v, ids: taylor_attention(q, k, v, document_ids_BT=ids)[0],
        attend_slice,
    ),
    "window": Operation(
        ((2, 4), (2, 4), (2, 4)),
        lambda q, k, v, ids: sliding_window_attention(q, k, v, window_left=WINDOW, key_document_ids_BS=ids),
        slide_slice,
    ),
    "convolution": Operation(
        ((2 * CHANNELS,),),
        lambda projected, ids: gated_conv_fused(projected, CONV_WEIGHT, key_document_ids_BS=ids),
        convolve_slice,
    ),
}
STEPS, LENGTH = 3, 7
SLICES = [(0, 7), (0, 3, 7), (0, 1, 7), (0, 6, 7), (0, 2, 5, 7), (0, 1, 2, 7), (0, 5, 6, 7)]


def ids_of_steps() -> Tensor:
    """Documents [B, STEPS x LENGTH] that go on for all steps, or end at, before and after the starts of steps and of slices."""
    starts = [[], [7, 14], [6], [8], [13, 15], [10, 12], [3, 20], list(range(1, 21))]
    ids = torch.zeros(len(starts), STEPS * LENGTH, dtype=torch.int32)
    for row, places in enumerate(starts):
        for place in places:
            ids[row, place:] += 1
    return ids


def outputs_and_gradients_of_whole(operation: Operation, inputs: list[Tensor], grad: Tensor) -> list[list[Tensor]]:
    """For each step, its part of the whole and the gradients to its own inputs; earlier inputs are constants."""
    found, ids = [], ids_of_steps()
    for step in range(STEPS):
        begin, end = step * LENGTH, (step + 1) * LENGTH
        mine = [x[:, begin:end].clone().requires_grad_() for x in inputs]
        joined = [torch.cat([x[:, :begin], part], dim=1) for x, part in zip(inputs, mine, strict=True)]
        output = operation.whole(*joined, ids[:, :end])[:, begin:]
        found.append([output.detach(), *torch.autograd.grad(output, mine, grad[:, begin:end])])
    return found


def outputs_and_gradients_of_slices(
    ranks: ContextRanks, operation: Operation, bounds: tuple[int, ...], spoil: bool, inputs: list[Tensor], grad: Tensor
) -> list[list[Tensor]]:
    """For each step, the part of this rank's slice."""
    found, ids, carried = [], ids_of_steps(), CarriedState()
    for begin in range(0, STEPS * LENGTH, LENGTH):
        documents = documents_of_part(ids, begin, begin + LENGTH)
        if spoil and ranks.rank == 0:
            assert spoil_what_has_ended(carried, documents) or not begin
        plan = SequencePlan(ranks, bounds, documents, CPU, carried)
        here = slice(begin + plan.start, begin + plan.end)
        mine = [x[:, here].clone().requires_grad_() for x in inputs]
        output = operation.slice(*mine, plan)
        found.append([output.detach(), *torch.autograd.grad(output, mine, grad[:, here])])
        carried = carried.next(LENGTH)
    return found


@pytest.mark.parametrize("spoil", [False, True], ids=["", "nan"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_step_after_step_are_those_of_one_long_sequence(name, spoil):
    """Outputs and gradients. With NaN in all that no document goes on with too: it is selected out, since 0 x NaN is NaN."""
    operation, ids = OPERATIONS[name], ids_of_steps()
    inputs = [seeded(*ids.shape, *shape, seed=i) for i, shape in enumerate(operation.inputs)]
    with torch.no_grad():
        grad = seeded(*operation.whole(*inputs, ids).shape, seed=20)
    expected = outputs_and_gradients_of_whole(operation, inputs, grad)
    for bounds in SLICES:
        run = functools.partial(
            outputs_and_gradients_of_slices,
            operation=operation, bounds=bounds, spoil=spoil, inputs=inputs, grad=grad,
        )  # fmt: skip
        of_ranks = on_threads(len(bounds) - 1, run)
        for step in range(STEPS):
            for i, whole in enumerate(expected[step]):
                found = torch.cat([of_rank[step][i] for of_rank in of_ranks], dim=1)
                assert gap(found, whole) < EXACT, (bounds, step, i)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=8), st.integers(0, 60))
def test_the_past_knows_the_tokens_of_the_steps_that_counted(history, tokens):
    past, stream = Past(), []
    for counts, length in history:
        past = past.seen(length) if counts else past.missed(length)
        stream += [counts] * length
    assert past.known(tokens) == sum(stream[len(stream) - min(tokens, len(stream)) :])


def test_documents_go_back_no_further_than_what_is_known():
    documents = Documents((torch.tensor([0]),) * 3, (3, 40, 100))
    assert documents.with_past(Past().seen(16).known).tokens_before == (3, 16, 16)
    assert documents.with_past(Past().seen(16).missed(10).seen(2).known).tokens_before == (2, 18, 18)
    assert documents.with_past(Past().known).tokens_before == (0, 0, 0)


def test_a_step_leaves_a_past_of_its_own_tokens():
    """A document that began long before the first step goes on from these, and one that was skipped adds none."""
    first = CarriedState().next(12)
    assert first.past.known(100) == 12
    assert first.stay(12).next(12).past.runs == ((12, 12), (12, 0))
