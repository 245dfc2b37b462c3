"""Pipeline stages: every layer once and in order, however the layers divide."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from based_megatron.parallel.stages import Stage, split_layers


def in_model_order(num_layers: int, pipeline: int, chunks: int) -> list[Stage]:
    """All stages in the order in which a micro batch meets them: every rank's first chunk, then every rank's second..."""
    by_rank = [split_layers(num_layers, rank, pipeline, chunks) for rank in range(pipeline)]
    return [by_rank[rank][chunk] for chunk in range(chunks) for rank in range(pipeline)]


@given(pipeline=st.integers(1, 8), chunks=st.integers(1, 4), extra=st.integers(0, 40))
def test_every_layer_is_held_once_and_in_order(pipeline, chunks, extra):
    stages = in_model_order(pipeline * chunks + extra, pipeline, chunks)
    assert [layer for stage in stages for layer in stage.layers] == list(range(pipeline * chunks + extra))


@given(pipeline=st.integers(1, 8), chunks=st.integers(1, 4), extra=st.integers(0, 40))
def test_stages_are_even_and_the_last_is_never_longer(pipeline, chunks, extra):
    sizes = [len(stage.layers) for stage in in_model_order(pipeline * chunks + extra, pipeline, chunks)]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@given(pipeline=st.integers(1, 8), chunks=st.integers(1, 4))
def test_the_ends_hold_embedding_and_output(pipeline, chunks):
    stages = in_model_order(pipeline * chunks, pipeline, chunks)
    assert [stage.is_first for stage in stages] == [True] + [False] * (len(stages) - 1)
    assert [stage.is_last for stage in stages] == [False] * (len(stages) - 1) + [True]


@pytest.mark.parametrize(
    ("rank", "layers"), [(0, range(0, 7)), (1, range(7, 14)), (2, range(14, 21)), (3, range(21, 27))]
)
def test_27_layers_over_four_stages(rank, layers):
    (stage,) = split_layers(27, rank, 4, 1)
    assert stage == Stage(layers, rank == 0, rank == 3, None)


def test_chunks_are_dealt_round():
    assert [stage.layers for stage in split_layers(8, 1, 2, 2)] == [range(2, 4), range(6, 8)]
    assert [stage.chunk for stage in split_layers(8, 1, 2, 2)] == [0, 1]
