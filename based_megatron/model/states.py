"""Decoding states of a batch of sequences, over all layers.

Legend: B sequences.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class ModelStates:
    """States of all layers and the place in each sequence. Buffers are updated in place and never move."""

    layers: Mapping[str, Any]
    """State of each mixer, by the layer's name in the model."""
    position_B: Tensor
    """Tokens absorbed so far, int64."""
    is_start: bool = True
    """True if no row has absorbed anything yet."""

    def restart(self) -> None:
        """Forget all sequences."""
        for x in self.tensors().values():
            x.zero_()
        self.is_start = True

    def clone(self) -> "ModelStates":
        """A copy with its own buffers: one prompt, several continuations."""
        return self._with(Tensor.clone)

    def rows(self, begin: int, end: int) -> "ModelStates":
        """Some neighbouring sequences of the batch, in the same buffers."""
        return self._with(lambda x: x[begin:end])

    def take(self, row_B: Tensor) -> "ModelStates":
        """A batch of these rows in buffers of its own; a row may come more than once."""
        return self._with(lambda x: x.index_select(0, row_B))

    def put(self, row_B: Tensor, other: "ModelStates") -> None:
        """Give these rows the states of another batch, which has as many; nothing is left of what they held."""
        for x, y in zip(self.tensors().values(), other.tensors().values(), strict=True):
            x.index_copy_(0, row_B, y)
        self.is_start = self.is_start and other.is_start

    def tensors(self) -> dict[str, Tensor]:
        """All buffers by name."""
        layers = {f"{name}.{key}": x for name, state in self.layers.items() for key, x in vars(state).items()}
        return {"position": self.position_B, **layers}

    def copy_(self, other: "ModelStates") -> None:
        """Take over the states of another batch of this size."""
        for x, y in zip(self.tensors().values(), other.tensors().values(), strict=True):
            x.copy_(y)
        self.is_start = other.is_start

    def bytes_per_sequence(self) -> int:
        """Memory that one sequence needs, whatever its length."""
        return sum(x.nbytes for x in self.tensors().values()) // len(self.position_B)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "ModelStates":
        layers = {
            name: dataclasses.replace(state, **{key: change(x) for key, x in vars(state).items()})
            for name, state in self.layers.items()
        }
        return ModelStates(layers, change(self.position_B), self.is_start)
