"""What the Mamba mixers have in common: their decoding state, and how their steps, rates and convolutions begin.

Legend: B sequences, C channels of the convolution, h = taps - 1 inputs in front of it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = (1e-3, 0.1)
"""Range of the initial steps, drawn evenly in their logarithms."""


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
        rows = self.inputs_BhC.shape[1]
        joined = torch.cat([self.inputs_BhC, inputs_BTC], dim=1)
        self.inputs_BhC.copy_(joined[:, joined.shape[1] - rows :])


def drawn_taps(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Taps U(-1 / sqrt(taps), 1 / sqrt(taps))."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def drawn_step_bias(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Biases whose softplus, the step before the input has a say, is drawn from STEPS."""
    steps = torch.empty(shape).uniform_(*map(math.log, STEPS), generator=generator).exp()
    return steps + (-torch.expm1(-steps)).log()
