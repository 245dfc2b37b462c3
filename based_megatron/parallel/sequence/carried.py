"""Carried states: what a step leaves for the next one where a document goes on, without gradients.

A step sees the step before as one more slice, number -1, in front of the slices of its P ranks, and the next step as another,
number P, behind them. The first rank holds both, since a sequence begins there; with one rank nothing moves.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.sharding import ShardSpec

STEP_BEFORE = -1
"""Number of the slice of the step before."""


@dataclass(frozen=True)
class CarriedForm:
    """Shape and dtype of one carried state of one sequence in one layer, not sharded."""

    shape: tuple[int, ...]
    cut_dim: int
    """Dim that is cut over the tensor parallel ranks."""
    dtype: torch.dtype


@dataclass(frozen=True)
class Past:
    """The tokens of a row before a step: runs of them, of which some are known. Equal on all rows and ranks.

    A step that did not count leaves a gap: the document that goes through it goes on from what was known before.
    """

    runs: tuple[tuple[int, int], ...] = ()
    """(tokens known, tokens missing before them), the newest run first. Nothing is known before the last one."""

    def known(self, tokens: int) -> int:
        """How many of the newest `tokens` tokens are known."""
        found = 0
        for known, missing in self.runs:
            found += min(max(tokens, 0), known)
            tokens -= known + missing
        return found

    def seen(self, tokens: int) -> "Past":
        """The past after so many more tokens."""
        (known, missing), *rest = self.runs or ((0, 0),)
        return Past(((known + tokens, missing), *rest))

    def missed(self, tokens: int) -> "Past":
        """The past after so many tokens that did not count."""
        return Past(((0, tokens), *self.runs)) if self.runs else self


@dataclass
class CarriedState:
    """The carried state of one micro batch: states of linear attention and last rows of its sequences, by kind and layer."""

    before: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """What this step begins with, on the first rank alone; nothing, or zeros, at the start of a run."""
    past: Past = Past()
    """The tokens of each sequence's row that `before` knows of."""
    after: dict[tuple[str, int], Pending[Tensor | None]] = field(default_factory=dict)
    """What the next step will begin with, on its way; None on ranks that only send."""

    def slices(self, size: int) -> range:
        """Numbers of the slices that rows and states flow between, where `size` ranks share a sequence."""
        return range(STEP_BEFORE, size + 1)

    def receive(self) -> dict[tuple[str, int], Tensor]:
        """What the next step begins with, on the first rank. Waits until all that was sent has arrived."""
        arrived = {key: pending.wait() for key, pending in self.after.items()}
        return {key: value for key, value in arrived.items() if value is not None}

    def next(self, length_tokens: int) -> "CarriedState":
        """The carried state of the next step, after this one of so many tokens."""
        return CarriedState(self.receive(), self.past.seen(length_tokens))

    def stay(self, length_tokens: int) -> "CarriedState":
        """The carried state of the next step, after this one of so many tokens did not count: what it began with.

        Nothing of what this step has left is in it: one NaN would stay for good.
        """
        self.receive()
        return CarriedState(self.before, self.past.missed(length_tokens))


class NothingCarried(CarriedState):
    """The carried state of sequences that begin and end within one step: no slice but those of the ranks."""

    def slices(self, size: int) -> range:
        return range(size)


@dataclass
class CarriedStates:
    """The carried states of all micro batches of this rank."""

    by_row: dict[int, CarriedState]
    """Those that the next step begins with, by the row of the global batch that a micro batch begins with."""
    specs: dict[tuple[str, int], ShardSpec]
    """Where tensors of this rank lie in those of all rows and heads, by kind and layer; empty on ranks that begin no sequence."""

    @property
    def past(self) -> Past:
        """The tokens of each row that are known."""
        return next(iter(self.by_row.values())).past

    @past.setter
    def past(self, past: Past) -> None:
        for state in self.by_row.values():
            state.past = past

    def receive(self) -> None:
        """Wait until all that the step has sent has arrived."""
        for state in self.by_row.values():
            state.receive()

    def advance(self, length_tokens: int, counts: bool) -> None:
        """Go on to the step after one of so many tokens; one that does not count leaves the carried states as they were."""
        self.by_row = {
            row: state.next(length_tokens) if counts else state.stay(length_tokens)
            for row, state in self.by_row.items()
        }
