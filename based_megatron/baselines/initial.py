"""Initial values that several baselines draw alike."""

import math

import torch
from torch import Tensor

STEPS = (1e-3, 0.1)
"""Range of initial steps, drawn evenly in their logarithms."""


def drawn_log_steps(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Logarithms of steps from STEPS."""
    return torch.empty(shape).uniform_(*map(math.log, STEPS), generator=generator)


def drawn_step_bias(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Biases whose softplus, the step before the input has a say, is drawn from STEPS."""
    steps = drawn_log_steps(shape, generator).exp()
    return steps + (-torch.expm1(-steps)).log()


def drawn_taps(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values U(-1 / sqrt(n), 1 / sqrt(n)) for n the last dimension: the taps of a channel, or the inputs of a projection."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def drawn_tap_biases(shape: tuple[int, ...], taps: int, generator: torch.Generator) -> Tensor:
    """Biases of convolutions of so many taps, drawn as these are: PyTorch's way."""
    return drawn_taps((*shape, taps), generator)[..., 0]
