"""What hosts know of slices before anything is sent: gates, messages, ids, nodes. Against definitions written out."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from based_megatron.parallel.sequence.carried import CarriedState
from based_megatron.parallel.sequence.documents import Documents
from based_megatron.parallel.sequence.in_process import in_process_ranks
from based_megatron.parallel.sequence.messages import Message
from based_megatron.parallel.sequence.plan import SequencePlan, whole_sequence
from based_megatron.parallel.sequence.ranks import split_into_nodes
from support.sequence import CPU, flows, plan_for, telling_documents


@st.composite
def slices_and_documents(draw):
    """(bounds, ids [B, S])."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    bounds = tuple(itertools.accumulate([0, *lengths]))
    rows = draw(st.integers(1, 3))
    changes = draw(
        st.lists(st.lists(st.booleans(), min_size=bounds[-1], max_size=bounds[-1]), min_size=rows, max_size=rows)
    )
    return bounds, torch.tensor(changes).int().cumsum(1).int()


def plans(bounds, ids, **options) -> list[SequencePlan]:
    return [plan_for(ranks, bounds, ids, **options) for ranks in in_process_ranks(len(bounds) - 1)]


def all_messages(of_ranks: list[SequencePlan], rows: int) -> list[Message]:
    """Those of all ranks; each is known to exactly the ranks of its two ends."""
    known = Counter(message for plan in of_ranks for message in plan.messages(rows))
    for plan in of_ranks:
        assert all(plan.holds(m.owner) or plan.holds(m.reader) for m in plan.messages(rows))
    assert all(count == len({of_ranks[0].holder(m.owner), of_ranks[0].holder(m.reader)}) for m, count in known.items())
    return sorted(known, key=lambda m: (m.reader, m.owner))


@given(slices_and_documents())
def test_gates_are_one_where_a_document_covers_all_between(case):
    bounds, ids = case
    size = len(bounds) - 1
    for plan in plans(bounds, ids)[:1]:
        expected = [[[float(flows(row, bounds, p, r)) for p in range(size)] for r in range(size)] for row in ids]
        assert plan.gates.tolist() == expected
        assert plan.crosses == any(ids[b, edge - 1] == ids[b, edge] for b in range(len(ids)) for edge in bounds[1:-1])


def test_without_documents_everything_flows():
    plan = plans((0, 2, 3, 7), None)[0]
    assert plan.gates.tolist() == [[[0, 0, 0], [1, 0, 0], [1, 1, 0]]] and plan.crosses
    assert plan.document_ids(3) is None


@settings(max_examples=200)
@given(slices_and_documents(), st.integers(1, 12))
def test_messages_bring_every_row_that_a_token_may_see(case, rows):
    bounds, ids = case
    of_ranks = plans(bounds, ids)
    messages = all_messages(of_ranks, rows)
    for reader, plan in enumerate(of_ranks):
        start = bounds[reader]
        received = {p for m in messages if m.reader == reader for p in range(m.first, m.last)}
        visible = {
            p for p in range(max(0, start - rows), start) for row in ids if len(set(row[p : start + 1].tolist())) == 1
        }
        assert visible <= received <= set(range(max(0, start - rows), start))
        halo = plan.halo_rows(rows)
        assert received == set(range(start - halo, start))
        for m in messages:
            # Nothing is sent that no document needs.
            assert bounds[m.owner] <= m.first < m.last <= bounds[m.owner + 1]
            assert any(flows(row, bounds, m.owner, m.reader) for row in ids)
        found = plan.document_ids(rows)
        here = ids[:, start - halo : bounds[reader + 1]]
        assert found is not None and torch.equal(found[:, :, None] == found[:, None], here[:, :, None] == here[:, None])


def test_a_halo_of_short_slices_comes_from_several():
    of_ranks = plans((0, 1, 3, 4, 9), None)
    assert all_messages(of_ranks, 3) == [
        Message(0, 1, 0, 1), Message(0, 2, 0, 1), Message(1, 2, 1, 3), Message(1, 3, 1, 3), Message(2, 3, 3, 4)
    ]  # fmt: skip
    assert [plan.halo_rows(3) for plan in of_ranks] == [0, 1, 3, 3]
    assert [plan.length for plan in of_ranks] == [1, 2, 1, 5]


def test_carried_rows_are_a_slice_before_the_first_and_those_for_the_next_step_one_after_the_last():
    documents = Documents((torch.tensor([0]), torch.tensor([0, 1])), tokens_before=(3, 0))
    ranks = in_process_ranks(3)
    of_ranks = [SequencePlan(place, (0, 2, 3, 6), documents, CPU, CarriedState()) for place in ranks]
    assert [plan.halo_rows(4) for plan in of_ranks] == [4, 4, 4]
    assert of_ranks[0].document_ids(4).tolist() == [[-1] + [0] * 5, [-1] * 4 + [0, 1]]  # type: ignore[union-attr]
    assert of_ranks[1].document_ids(4).tolist() == [[0] * 5, [-1, -1, 0, 1, 1]]  # type: ignore[union-attr]
    assert all_messages(of_ranks, 4) == [
        Message(-1, 0, -4, 0), Message(-1, 1, -2, 0), Message(0, 1, 0, 2), Message(-1, 2, -1, 0), Message(0, 2, 0, 2),
        Message(1, 2, 2, 3), Message(1, 3, 2, 3), Message(2, 3, 3, 6),
    ]  # fmt: skip


def test_ids_of_documents_count_from_their_starts():
    ids = telling_documents((0, 4, 8))
    assert torch.equal(Documents.from_ids(ids).numbers(torch.arange(8)), ids)
    assert Documents.from_ids(ids + 3).numbers(torch.tensor([-1, 0]))[:, 0].tolist() == [-1] * len(ids)


def test_one_rank_has_the_whole_sequence():
    plan = whole_sequence(None, 5, CPU)
    assert plan.is_whole and not plan.crosses and plan.halo_rows(3) == 0 and (plan.start, plan.end) == (0, 5)


@pytest.mark.parametrize(
    ("ranks", "node_ranks", "expected"),
    [
        (range(4), 2, [(0, 1), (2, 3)]),
        (range(0, 8, 2), 4, [(0, 2), (4, 6)]),  # every second rank, under tensor parallelism
        (range(4), 8, [(0, 1, 2, 3)]),
        (range(0, 8, 4), 4, []),  # one rank of each node: nothing is near
        (range(6), 4, []),  # 4 and 2
        (range(2, 6), 4, [(2, 3), (4, 5)]),
        (range(4), 0, []),
    ],
)
def test_nodes_of_context_ranks(ranks, node_ranks, expected):
    assert split_into_nodes(ranks, node_ranks) == expected
