"""Data parallel ranks of an evaluation: each computes its share of the batches, all get all results."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch

from based_megatron.checkpoint.ranks import Ranks, all_ranks
from based_megatron.parallel.environment import RankInfo
from based_megatron.parallel.topology import join, leave

T = TypeVar("T")
TIMEOUT_SECONDS = 4 * 3600
"""A rank that is done waits so long for the others."""


def deal(
    ranks: Ranks, batches: Sequence[Sequence[int]], compute: Callable[[Sequence[int]], Sequence[T]]
) -> dict[int, T]:
    """Results of all batches of indices by index, on every rank (collective): batch i is computed by rank i mod P.

    Batches do not depend on the number of ranks, so that results do not either.
    """
    mine: dict[int, T] = {}
    for batch in batches[ranks.rank :: ranks.size]:
        mine |= zip(batch, compute(batch), strict=True)
    shares = ranks.together(lambda: mine)
    return {index: result for share in shares for index, result in share.items()}


@contextmanager
def joined(info: RankInfo, device: torch.device) -> Iterator[Ranks]:
    """The ranks of this job, each with the whole model, which leave each other at the end."""
    join(info, device, TIMEOUT_SECONDS)
    try:
        yield all_ranks()
    finally:
        leave()


def cut_in_batches(weights: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive indices in batches whose weights sum to `most` at most; a heavier one is alone."""
    starts, total = [0], 0
    for index, weight in enumerate(weights):
        if total and total + weight > most:
            starts.append(index)
            total = 0
        total += weight
    return [list(range(*bounds)) for bounds in pairwise([*starts, len(weights)]) if bounds[0] < bounds[1]]
