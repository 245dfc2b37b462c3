"""The processes that act together on a checkpoint, and how they agree on failures."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from based_megatron.errors import BasedError, CheckpointError

T = TypeVar("T")
Outcome = tuple[Any, tuple[type[BasedError], str] | None]
"""The result of an action, and the error that it ended with, if it did."""


def result_of(outcome: Outcome) -> Any:
    """The result of an action on one rank. Raises the error that it ended with there."""
    result, failure = outcome
    if failure is not None:
        kind, message = failure
        raise kind(message)
    return result


@dataclass(frozen=True)
class Ranks:
    """This process among those that act together; alone by default, even where torch.distributed runs."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """None if alone. A gloo group keeps this traffic off the devices; NCCL works too."""

    def together(self, action: Callable[[], T]) -> list[T]:
        """Run `action` everywhere and return all results by rank, on every rank.

        If it failed on any, all ranks raise that BasedError (CheckpointError for others): nobody waits for one that gave up.
        """
        outcomes: list[Any] = [None] * self.size
        outcome = self._try(action)
        if self.group is None:
            outcomes = [outcome]
        else:
            dist.all_gather_object(outcomes, outcome, group=self.group)
        return [result_of(outcome) for outcome in outcomes]

    def on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result on every rank; fails everywhere if it fails there.

        Only rank 0's result travels, whatever its size; rank 0 does not wait for the others.
        """
        outcomes: list[Any] = [self._try(action) if self.rank == 0 else None]
        if self.group is not None:
            dist.broadcast_object_list(outcomes, group=self.group, group_src=0)
        return result_of(outcomes[0])

    def lowest(self, value: int) -> int:
        """The smallest of the values of all ranks, on every rank (collective; the group must be gloo)."""
        if self.group is None:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.group)
        return int(tensor)

    def _try(self, action: Callable[[], T]) -> Outcome:
        try:
            return action(), None
        except BasedError as error:
            return None, (type(error), str(error))
        except Exception as error:
            return None, (CheckpointError, self.describe(error, self.rank))

    def describe(self, error: BaseException, rank: int) -> str:
        """One line about an error, with its rank if there are several."""
        text = " ".join(str(error).split()) or "no message"
        text = text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
        return text if self.group is None else f"rank {rank}: {text}"

    def first_failure(self, error: CheckpointException) -> str:
        """One line about the first failure that torch.distributed.checkpoint collected (it collects interrupts too)."""
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        if not isinstance(cause, Exception):
            raise cause from error
        return self.describe(cause, rank)


ALONE = Ranks()


def all_ranks(group: dist.ProcessGroup | None = None) -> Ranks:
    """All ranks of a group (default: the world), or this process alone where torch.distributed is not running."""
    if not dist.is_initialized():
        return ALONE
    group = group or dist.group.WORLD
    return Ranks(dist.get_rank(group), dist.get_world_size(group), group)


@contextmanager
def without_dcp_warning(ranks: Ranks) -> Iterator[None]:
    """Surroundings for torch.distributed.checkpoint, which warns of a process that is alone.

    Filters of warnings belong to the whole process: threads that save have a group, and leave them as they are.
    """
    if ranks.group is not None:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
