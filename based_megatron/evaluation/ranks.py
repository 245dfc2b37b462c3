"""Data parallel ranks of an evaluation: each computes its share of the batches, all get all results."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch

from based_megatron.checkpoint.ranks import Ranks, all_ranks
from based_megatron.errors import ConfigError
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


def device_of(requested: str, local_rank: int) -> torch.device:
    """The device of this rank: that of the request, or a GPU if there is one. Raises ConfigError if it is not there."""
    wanted = requested or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"--device {wanted} is no device: give cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"there is no GPU for --device {wanted}: set --device cpu")
    if device.type != "cuda":
        return device
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(f"local rank {local_rank} has no GPU {index}: torch sees {torch.cuda.device_count()}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def cut_in_batches(weights: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive indices in batches whose weights sum to `most` at most; a heavier one is alone."""
    starts, total = [0], 0
    for index, weight in enumerate(weights):
        if total and total + weight > most:
            starts.append(index)
            total = 0
        total += weight
    return [list(range(*bounds)) for bounds in pairwise([*starts, len(weights)]) if bounds[0] < bounds[1]]
