"""Activations that were cast to e4m3 where they were made.

Legend: L tokens of a sequence, B sequences, D channels, T = L B tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from based_megatron.kernels.fp8 import Fp8Matrix


@dataclass(frozen=True)
class Fp8Tokens:
    """Activations [L, B, D] in e4m3, for the linear layer that reads them next, and nothing else."""

    stand_in: Tensor
    """[L, B, D] in the type of the gradient, which flows through it; it has no numbers and no memory."""
    rows_TD: Fp8Matrix

    @property
    def shape(self) -> torch.Size:
        return self.stand_in.shape

    def __getitem__(self, tokens: slice) -> Fp8Tokens:
        """Some tokens of every sequence."""
        L, B, D = self.shape
        numbers_LBD, scale_LB = self.rows_TD.numbers.view(L, B, D), self.rows_TD.scale.view(L, B)
        rows = Fp8Matrix(numbers_LBD[tokens].flatten(0, 1), scale_LB[tokens].flatten())
        return Fp8Tokens(self.stand_in[tokens], rows)


def stand_in(x: Tensor) -> Tensor:
    """A tensor like x without its numbers and its memory, whose gradient is that of x."""
    return _StandIn.apply(x)


def without_memory(shape: torch.Size, like: Tensor) -> Tensor:
    """A tensor of a shape that takes no memory, in the type and on the device of another."""
    return like.new_zeros(()).expand(shape)


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return without_memory(x.shape, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
