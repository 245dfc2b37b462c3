"""What a step leaves for the next one of the documents that go on, without gradients.

The first context rank holds it, since the next sequence begins there; with one rank nothing moves.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from based_megatron.parallel.sequence.channel import Pending
from based_megatron.parallel.sharding import ShardSpec


@dataclass(frozen=True)
class Left:
    """What one sequence leaves in one layer: its form in the whole model."""

    shape: tuple[int, ...]
    cut_dim: int
    """Dim that is cut over the tensor parallel ranks."""
    dtype: torch.dtype


@dataclass
class Carry:
    """Of one micro batch: states and last rows of its sequences, by kind and layer."""

    before: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """What the same rows of the batch left in the step before; nothing, or zeros, at the start of a run."""
    past_tokens: int = 0
    """Tokens of each sequence's row that `before` knows of. Equal on all ranks, which `before` need not be."""
    after: dict[tuple[str, int], Pending[Tensor]] = field(default_factory=dict)
    """What they leave now."""

    def next(self, length_tokens: int) -> "Carry":
        """For the step after one of so many tokens. All of it has arrived, and left, when it begins."""
        before = {key: pending.wait() for key, pending in self.after.items()}
        return Carry(before, self.past_tokens + length_tokens)


@dataclass
class Carries:
    """Of all micro batches of this rank."""

    by_row: dict[int, Carry]
    """What the next step begins with, by the row of the global batch that a micro batch begins with."""
    specs: dict[tuple[str, int], ShardSpec]
    """Where tensors of this rank lie in those of all rows and heads, by kind and layer; empty on ranks that begin no sequence."""

    @property
    def past_tokens(self) -> int:
        """Tokens of each row that are known."""
        return next(iter(self.by_row.values())).past_tokens

    @past_tokens.setter
    def past_tokens(self, tokens: int) -> None:
        for carry in self.by_row.values():
            carry.past_tokens = tokens

    def advance(self, length_tokens: int) -> None:
        """To the step after one of so many tokens."""
        self.by_row = {row: carry.next(length_tokens) for row, carry in self.by_row.items()}
