"""The decoding state of the Mamba mixers.

Legend: B sequences, C channels of the convolution, h = taps - 1 inputs in front of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from based_megatron.kernels.decode import ConvState


@dataclass(frozen=True)
class StateSpaceState:
    """The decoding state of a batch of sequences."""

    state: Tensor
    """[B, heads or channels, ...], fp32, or fp64 under fp64 models."""
    inputs_BhC: Tensor
    """The last inputs of the convolution, oldest first, in the model's dtype."""

    @classmethod
    def zeros(
        cls, batch: int, shape: tuple[int, ...], inputs: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> "StateSpaceState":
        """The state of empty sequences in a model of `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            torch.zeros(batch, *shape, dtype=wide, device=device),
            torch.zeros(batch, *inputs, dtype=dtype, device=device),
        )

    def store(self, state: Tensor, inputs_BTC: Tensor) -> None:
        """Take over the state after some tokens, and the last of their inputs."""
        self.state.copy_(state)
        ConvState(self.inputs_BhC).store(inputs_BTC)
