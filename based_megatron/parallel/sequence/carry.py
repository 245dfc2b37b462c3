"""What a step leaves for the next one of the documents that go on, without gradients.

The first context rank holds it, since the next sequence begins there; with one rank nothing moves.
"""

from dataclasses import dataclass, field

from torch import Tensor

from based_megatron.parallel.sequence.channel import Pending


@dataclass
class Carry:
    """Of one micro batch: states and last rows of its sequences, by kind and layer."""

    before: dict[tuple[str, int], Pending[Tensor]] = field(default_factory=dict)
    """What the same rows of the batch left in the step before; nothing at the start of a run."""
    past_tokens: int = 0
    """Tokens of each sequence's row in the steps before, of this run. Equal on all ranks, which `before` need not be."""
    after: dict[tuple[str, int], Pending[Tensor]] = field(default_factory=dict)
    """What they leave now."""

    def next(self, length_tokens: int) -> "Carry":
        """For the step after one of so many tokens. All of it has arrived, and left, when it begins."""
        for pending in self.after.values():
            pending.wait()
        return Carry(before=self.after, past_tokens=self.past_tokens + length_tokens)
