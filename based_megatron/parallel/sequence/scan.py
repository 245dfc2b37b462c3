"""Gated sums of the states of other slices, by three algorithms. None is differentiable: states.py makes them so.

Legend: B sequences, X numbers of a state, P ranks, G ranks of a node, N nodes.

    prefix(r) = sum_p gates[r, p] state_p  over p < r        suffix(r) = sum_p gates[p, r] state_p  over p > r

Gates are 0 or 1 and known on every host (plan.rank_gates): the sums are fixed before anything is sent. A sum is never formed as
"inclusive minus own", which cancels, and terms are added in the order of ranks: the same bits in every run.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.sequence.plan import SequencePlan
from based_megatron.parallel.sequence.ranks import ContextRanks

FEW_RANKS = 8
SMALL_STATE_BYTES = 2 << 20
"""Up to so many ranks and bytes a plain all-gather is faster: it has one latency, the two levels have two or three."""


def start_gated_sum(state: Tensor, plan: SequencePlan, *, reverse: bool = False) -> Pending[Tensor]:
    """Begin to sum the states of the slices that flow into this one: those before it, or, in reverse, after it.

    state: [B, ...], fp32 or fp64, of this slice: moments of its last document, or adjoint moments of its first. All ranks call
    it, and only if `plan.crosses`. The sum has the same shape; nothing flows through it backward.
    """
    gates_BPP = plan.device_rank_gates.to(state.dtype)
    if reverse:
        gates_BPP = gates_BPP.transpose(1, 2)
    flat_BX, ranks = state.flatten(1), plan.ranks
    algorithm = choose(ranks, state.nbytes)
    if algorithm == "all_gather":
        pending = _all_gather(flat_BX, gates_BPP, ranks)
    elif algorithm == "two_level":
        pending = _beside(ranks, lambda x: _two_level(x, gates_BPP, ranks, reverse), flat_BX)
    else:
        pending = _beside(ranks, lambda x: _chain(x, gates_BPP, plan, reverse), flat_BX)
    return pending.then(lambda sum_BX: sum_BX.view(state.shape))


def choose(ranks: ContextRanks, state_bytes: int) -> Literal["all_gather", "two_level", "chain"]:
    """The algorithm of an exchange; `auto` looks at ranks, bytes and nodes."""
    if ranks.algorithm != "auto":
        return ranks.algorithm
    few = ranks.size <= FEW_RANKS and state_bytes <= SMALL_STATE_BYTES
    return "all_gather" if few or ranks.node is None else "two_level"


def _all_gather(state_BX: Tensor, gates_BPP: Tensor, ranks: ContextRanks) -> Pending[Tensor]:
    """One collective, P - 1 states received: the fewest latencies, the most bytes."""
    assert ranks.states is not None
    pending = ranks.states.all_gather("state", state_BX)
    return pending.then(lambda states_PBX: _weighted(gates_BPP[:, ranks.rank], states_PBX))


def _weighted(gates_BP: Tensor, states_PBX: Tensor) -> Tensor:
    """sum_p gates[b, p] states[p, b]: [B, X]."""
    gates_BP = gates_BP.expand(states_PBX.shape[1], -1)
    return torch.matmul(gates_BP[:, None], states_PBX.transpose(0, 1))[:, 0]


def _two_level(state_BX: Tensor, gates_BPP: Tensor, ranks: ContextRanks, reverse: bool) -> Tensor:
    """Inside nodes all-to-all, between them an all-gather of what leaves each node; every GPU works on 1 / G of the numbers.

    Bytes: 2 (G - 1) / G states inside the node, (N - 1) / G states between nodes. A node's summary flows into slice r exactly
    if its rank next to the way does: gates are made of documents, which are contiguous.
    """
    node, rail = ranks.node, ranks.rail
    assert node is not None
    B, X = state_BX.shape
    G = node.size
    here = range(ranks.rank - node.rank, ranks.rank - node.rank + G)
    part = -(-X // G)
    parts_BGX = functional.pad(state_BX, (0, G * part - X)).view(B, G, part)
    # One part of the numbers of all ranks of the node: [G, B, part].
    members = node.all_to_all("state", parts_BGX.transpose(0, 1).contiguous())
    inside = gates_BPP[:, here.start : here.stop, here.start : here.stop]
    sums = torch.einsum("brp,pbx->rbx", inside.expand(B, -1, -1), members)
    if rail is not None:
        # The first rank that anything leaving the node reaches, and the rank of every node that its summary passes last.
        beyond = here.start - 1 if reverse else here.stop
        exits = slice(0 if reverse else G - 1, None, G)
        leaving = torch.zeros_like(members[0])
        if 0 <= beyond < ranks.size:
            leaving = torch.einsum("bp,pbx->bx", gates_BPP[:, beyond, here.start : here.stop].expand(B, -1), members)
        summaries = rail.all_gather("state", leaving).wait()
        # The gates are zeros for the own node, whose members are in `sums` already, and for nodes on the other side.
        outer = gates_BPP[:, here.start : here.stop, exits]
        sums = sums + torch.einsum("brk,kbx->rbx", outer.expand(B, -1, -1), summaries)
    mine = node.all_to_all("state", sums.contiguous())
    return mine.transpose(0, 1).reshape(B, G * part)[:, :X]


def _chain(state_BX: Tensor, gates_BPP: Tensor, plan: SequencePlan, reverse: bool) -> Tensor:
    """From neighbour to neighbour: the fewest bytes, P - 1 latencies one after another. For tests and odd networks."""
    ranks = plan.ranks
    assert ranks.states is not None
    step = -1 if reverse else 1
    before, here, after = ranks.rank - step, ranks.rank, ranks.rank + step
    sum_BX = torch.zeros_like(state_BX)
    if 0 <= before < ranks.size and _flows(plan, before, here):
        ranks.states.exchange("state", [], [(before, sum_BX)]).wait()
    if 0 <= after < ranks.size and _flows(plan, here, after):
        passing = state_BX * gates_BPP[:, after, here, None]
        if 0 <= before < ranks.size:
            passing = passing + sum_BX * gates_BPP[:, after, before, None]
        ranks.states.exchange("state", [(after, passing.contiguous())], []).wait()
    return sum_BX


def _flows(plan: SequencePlan, source: int, target: int) -> bool:
    return bool(plan.rank_gates[:, max(source, target), min(source, target)].any())


def _beside(ranks: ContextRanks, work: Callable[[Tensor], Tensor], x: Tensor) -> Pending[Tensor]:
    """Run `work`, which waits for other ranks several times, while the computation goes on: on a GPU on a stream of its own."""
    side = ranks.side_stream
    if side is None:
        return Pending.done(work(x))
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = work(x)
        ready = side.record_event()
    x.record_stream(side)

    def finish() -> Tensor:
        torch.cuda.current_stream().wait_event(ready)
        result.record_stream(torch.cuda.current_stream())
        return result

    return Pending(finish)
