"""Calls and bytes of a step over slices are those of the formulas; where nothing crosses, nothing is sent.

m is a state: 4 bytes x sequences x heads x packed rows x (head dim + 1) in fp32, 8 in fp64 as here.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_sequence_exchange import small_mixer
from torch import Tensor

from based_megatron.config import ParallelConfig
from based_megatron.kernels.packing import packed_rows
from based_megatron.kernels.rotary import rotary_tables
from based_megatron.model.block import _recomputed
from based_megatron.model.mixers import MixerInputs
from based_megatron.parallel.topology import build_topology
from support.pool import rank_device
from support.sequence import plan_for, seeded

B, L, D, HEADS, FEATURES, WINDOW, TAPS, CHANNELS = 2, 8, 16, 2, 4, 5, 3, 32
BYTES = 8
STATE = BYTES * B * HEADS * packed_rows(FEATURES) * (D // HEADS + 1)
WINDOW_ROWS, CONV_ROWS = BYTES * B * WINDOW * 2 * D, BYTES * B * (TAPS - 1) * CHANNELS


def traffic(letter: str, algorithm: Any, crosses: bool, recompute: bool = False) -> list[tuple[int, int, int]]:
    """(calls, bytes sent, bytes received) of one rank, forward and then backward."""
    size = dist.get_world_size()
    parallel = ParallelConfig(context=size, state_exchange=algorithm)
    topology = build_topology(parallel, rank_device(dist.get_rank()), node_ranks=2)
    mixer = small_mixer(letter, topology, parallel, torch.float64, "reference", {})
    mixer.config.recompute = "mixer" if recompute else "none"
    bounds = tuple(range(0, size * L + 1, L))
    ids = None if crosses else (torch.arange(size * L) // L).int().repeat(B, 1)
    plan = plan_for(topology.sequence, bounds, ids)
    x = seeded(L, B, D, seed=topology.context.rank).requires_grad_()
    rotary = rotary_tables(torch.arange(plan.start, plan.end), D // HEADS, 1.0, 1e4, x.dtype)
    counters = topology.sequence.traffic
    counters.clear()

    def counts() -> tuple[int, int, int]:
        found = tuple(
            int(sum(counter.values())) for counter in (counters.calls, counters.sent_bytes, counters.received_bytes)
        )
        counters.clear()
        return found  # type: ignore[return-value]

    def mix(x: Tensor, inputs: MixerInputs) -> Tensor:
        return mixer(x, inputs=inputs)[0]

    inputs = MixerInputs(plan, rotary)
    y = _recomputed(mix, x, inputs) if recompute else mix(x, inputs)
    forward = counts()
    y.sum().backward()
    return [forward, counts()]


def expected(letter: str, algorithm: str, size: int, rank: int) -> list[tuple[int, int, int]]:
    """The formulas."""
    if letter == "L" and algorithm == "all_gather":
        return [(1, (size - 1) * STATE, (size - 1) * STATE)] * 2
    if letter == "L" and algorithm == "two_level":
        # Two all-to-alls of half a state each, and between two nodes half a state.
        nodes = size // 2
        part = STATE // 2
        moved = 2 * part + (nodes - 1) * part
        return [(2 if nodes == 1 else 3, moved, moved)] * 2
    one = {"L": STATE, "S": WINDOW_ROWS, "c": CONV_ROWS}[letter]
    has_next, has_previous = rank < size - 1, rank > 0
    # A chain receives and sends in two calls, a halo in one.
    calls = has_next + has_previous if letter == "L" else 1
    return [(calls, one * has_next, one * has_previous), (calls, one * has_previous, one * has_next)]


CASES = [("L", "all_gather"), ("L", "two_level"), ("L", "chain"), ("S", "auto"), ("c", "auto")]


def traffic_of_cases(crosses: bool, recompute: bool) -> dict[tuple[str, str], list[tuple[int, int, int]]]:
    return {(letter, algorithm): traffic(letter, algorithm, crosses, recompute) for letter, algorithm in CASES}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_and_calls(worker_pool, size, recompute):
    """Recomputed activations ask for nothing again: as many bytes and calls as without."""
    for rank, found in enumerate(worker_pool(size).run(traffic_of_cases, True, recompute)):
        for (letter, algorithm), counts in found.items():
            assert counts == expected(letter, algorithm, size, rank), (letter, algorithm, rank)


@pytest.mark.parametrize("size", [2, 4])
def test_nothing_is_sent_where_no_document_crosses(worker_pool, size):
    for found in worker_pool(size).run(traffic_of_cases, False, False):
        assert found == {case: [(0, 0, 0)] * 2 for case in CASES}
