"""A rank's piece of a parameter: every element of the unsharded tensor lies on one rank, fused parts are cut one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from based_megatron.parallel.sharding import ShardSpec, rows_of_rank

PARTS = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
OTHER_DIMS = st.lists(st.integers(1, 3), min_size=0, max_size=2).map(tuple)


@st.composite
def sharded(draw) -> tuple[Tensor, list[ShardSpec]]:
    """An unsharded tensor without zeros, and the specs of all ranks."""
    parts, others = draw(PARTS), draw(OTHER_DIMS)
    dim = draw(st.integers(0, len(others)))
    shape = (*others[:dim], sum(parts), *others[dim:])
    size, multiple = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    full = torch.arange(1, 1 + int(torch.tensor(shape).prod()), dtype=torch.float32).reshape(shape)
    return full, [ShardSpec("name", shape, dim, parts, rank, size, multiple) for rank in range(size)]


def stacked_cuts(full: Tensor, spec: ShardSpec) -> Tensor:
    """A rank's piece, made in another way: each part padded for all ranks, chunked, and stacked."""
    dim = spec.partition_dim
    assert dim is not None
    pieces = []
    for part in full.split(list(spec.parts), dim=dim):
        padding = list(part.shape)
        padding[dim] = spec.size * rows_of_rank(part.shape[dim], spec.size, spec.multiple) - part.shape[dim]
        pieces.append(torch.cat([part, torch.zeros(padding)], dim=dim).chunk(spec.size, dim=dim)[spec.rank])
    return torch.cat(pieces, dim=dim)


@settings(max_examples=200, deadline=None)
@given(sharded())
def test_cut_takes_this_ranks_chunk_of_every_part(case):
    full, specs = case
    for spec in specs:
        local = spec.cut(full)
        assert local.shape == spec.local_shape
        assert torch.equal(local, stacked_cuts(full, spec))


@settings(max_examples=200, deadline=None)
@given(sharded())
def test_the_regions_of_all_ranks_put_the_tensor_together_once(case):
    full, specs = case
    rebuilt, times = torch.zeros_like(full), torch.zeros_like(full)
    for spec in specs:
        local = spec.cut(full)
        for region in spec.regions():
            region.of_global(rebuilt).copy_(region.of_local(local))
            region.of_global(times).add_(1)
            assert region.of_local(local).shape == region.shape
    assert torch.equal(rebuilt, full) and bool((times == 1).all())


@settings(max_examples=100, deadline=None)
@given(sharded())
def test_regions_come_in_order_and_leave_out_padding_alone(case):
    full, specs = case
    for spec in specs:
        held = torch.zeros(spec.local_shape, dtype=torch.bool)
        for region in spec.regions():
            region.of_local(held).fill_(True)
        assert torch.equal(held, spec.cut(full) != 0)
        offsets = [region.local_offset for region in spec.regions()]
        assert offsets == sorted(offsets)


def test_a_fused_projection_over_two_ranks():
    """[q | k | v] of 4, 2 and 2 rows: rank 1 holds rows 2, 3 of q, then 1 of k, then 1 of v."""
    spec = ShardSpec("qkv", (8, 1), 0, (4, 2, 2), rank=1, size=2)
    assert spec.cut(torch.arange(8.0)[:, None]).flatten().tolist() == [2, 3, 5, 7]


@pytest.mark.parametrize(
    ("rows", "size", "expected"),
    [(50_264, 1, 50_264), (50_264, 2, 25_152), (50_264, 8, 6_336), (91, 2, 64), (91, 3, 31), (64, 2, 32), (65, 2, 64)],
)
def test_rows_are_rounded_up_if_every_rank_keeps_some(rows, size, expected):
    assert rows_of_rank(rows, size, 64) == expected


def test_padding_may_leave_a_rank_with_nothing():
    """Two rows over four ranks: one each on the first two."""
    pieces = [ShardSpec("w", (2,), 0, (2,), rank, 4) for rank in range(4)]
    assert [len(piece.regions()) for piece in pieces] == [1, 1, 0, 0]
    assert [piece.cut(torch.tensor([5.0, 6.0])).tolist() for piece in pieces] == [[5.0], [6.0], [0.0], [0.0]]


@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_not_cut_is_whole_on_every_rank(rank):
    spec, full = ShardSpec("norm", (3, 2), rank=rank, size=4), torch.rand(3, 2)
    (region,) = spec.regions()
    assert spec.local_shape == (3, 2) and torch.equal(spec.cut(full), full)
    assert region.shape == (3, 2) and region.local_offset == region.global_offset == (0, 0)
