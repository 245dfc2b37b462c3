"""The rectangles of all fragments tile the unsharded tensor, for every layout."""

from itertools import pairwise
from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from based_megatron.checkpoint.fragments import rectangles
from based_megatron.parallel.sharding import ShardSpec


@st.composite
def layouts(draw) -> list[ShardSpec]:
    """The specs of all tensor parallel ranks of one parameter of one to three dims."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    dim = draw(st.none() | st.integers(0, len(shape) - 1))
    if dim is None:
        return [ShardSpec("weight", tuple(shape))]
    parts = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    shape[dim] = sum(parts)
    size = draw(st.integers(1, 4))
    return [ShardSpec("weight", tuple(shape), dim, parts, rank, size) for rank in range(size)]


@st.composite
def cuts(draw, numel: int) -> list[tuple[int, int]]:
    """Flat ranges (start, numel) that cover a local parameter, cut anywhere."""
    inner = draw(st.lists(st.integers(0, numel), max_size=4))
    edges = [0, *sorted(inner), numel]
    return [(a, b - a) for a, b in pairwise(edges)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rectangles_of_all_fragments_cover_each_element_once_with_its_value(data):
    specs = data.draw(layouts())
    full = torch.arange(1.0, 1 + prod(specs[0].shape)).view(specs[0].shape)
    seen, written = torch.zeros_like(full), torch.zeros_like(full)
    for spec in specs:
        local = spec.cut(full).reshape(-1)
        for start, numel in data.draw(cuts(local.numel())):
            fragment = local[start : start + numel]
            for rectangle in rectangles(spec, start, numel):
                box = tuple(slice(o, o + n) for o, n in zip(rectangle.global_offset, rectangle.shape, strict=True))
                seen[box] += 1
                written[box] = rectangle.view(fragment)
    assert torch.equal(seen, torch.ones_like(seen))
    assert torch.equal(written, full)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_writing_the_rectangles_fills_a_fragment_and_leaves_padding_alone(data):
    specs = data.draw(layouts())
    full = torch.arange(1.0, 1 + prod(specs[0].shape)).view(specs[0].shape)
    for spec in specs:
        expected = spec.cut(full).reshape(-1)
        for start, numel in data.draw(cuts(expected.numel())):
            buffer = torch.zeros(numel + 2)  # a fragment inside a partition: neighbours must stay
            for rectangle in rectangles(spec, start, numel):
                box = tuple(slice(o, o + n) for o, n in zip(rectangle.global_offset, rectangle.shape, strict=True))
                rectangle.view(buffer[1:-1]).copy_(full[box])
            assert torch.equal(buffer[1:-1], expected[start : start + numel])
            assert buffer[0] == buffer[-1] == 0


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), data=st.data())
def test_a_range_of_a_matrix_is_at_most_three_rectangles(rows, columns, data):
    spec = ShardSpec("weight", (rows, columns))
    for start, numel in data.draw(cuts(rows * columns)):
        assert len(rectangles(spec, start, numel)) <= 3


def test_a_range_of_one_whole_tensor_is_one_rectangle():
    assert len(rectangles(ShardSpec("weight", (5, 4, 3)), 0, 60)) == 1


def test_a_fragment_of_padding_only_has_no_rectangles():
    last = ShardSpec(
        "weight", (5, 2), 0, (5,), rank=3, size=4
    )  # 2 rows a rank: ranks 0..2 hold 5, rank 3 holds padding
    assert last.local_shape == (2, 2)
    assert rectangles(last, 0, 4) == []
