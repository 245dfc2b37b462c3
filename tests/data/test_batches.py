"""Batches of a stream."""

import pytest

from based_megatron.data.batches import batches


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([5], [[5]]),
        ([2, 3, 1], [[2, 3], [1]]),
        ([1, 9, 9, 1, 1], [[1], [9], [9], [1, 1]]),
    ],
)
def test_a_batch_has_at_most_the_size_or_one_item(sizes, expected):
    assert list(batches(sizes, lambda size: size, most=5)) == expected
