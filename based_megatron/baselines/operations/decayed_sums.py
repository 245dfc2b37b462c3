"""Sums over the past that fade, one for each channel: h_t = a_t h_{t-1} + x_t.

Legend: B batch, T tokens, X any last dimensions.

Spans of tokens double in length from pass to pass: after the pass of span s, h_t has the last 2s terms and a_t is the product of
as many factors. log2 T passes over the tensors take the place of T small steps, and nothing grows where no factor is above 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def decayed_sums(factors_BTX: Tensor, x_BTX: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + x_t for every token, from h = 0; a factor of 0 forgets all before it. Shapes broadcast after tokens."""
    return _DecayedSums.apply(factors_BTX.expand_as(x_BTX), x_BTX)


class _DecayedSums(torch.autograd.Function):
    """The gradient of a sum is the same kind of sum in reverse: dx_t = dh_t + a_{t+1} dx_{t+1}, da_t = dx_t h_{t-1}."""

    @staticmethod
    def forward(ctx: Any, factors_BTX: Tensor, x_BTX: Tensor) -> Tensor:
        h_BTX = _sums(factors_BTX, x_BTX)
        ctx.save_for_backward(factors_BTX, h_BTX)
        return h_BTX

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_BTX: Tensor) -> tuple[Tensor, Tensor]:
        factors_BTX, h_BTX = ctx.saved_tensors
        next_factors_BTX = torch.cat([factors_BTX[:, 1:], torch.zeros_like(factors_BTX[:, :1])], dim=1)
        dx_BTX = _sums(next_factors_BTX.flip(1), dh_BTX.flip(1)).flip(1)
        h_before_BTX = torch.cat([torch.zeros_like(h_BTX[:, :1]), h_BTX[:, :-1]], dim=1)
        return dx_BTX * h_before_BTX, dx_BTX


def _sums(factors_BTX: Tensor, x_BTX: Tensor) -> Tensor:
    tokens, span = x_BTX.shape[1], 1
    a, h = factors_BTX, x_BTX
    while span < tokens:
        h = torch.cat([h[:, :span], torch.addcmul(h[:, span:], a[:, span:], h[:, :-span])], dim=1)
        if 2 * span < tokens:
            a = torch.cat([a[:, :span], a[:, span:] * a[:, :-span]], dim=1)
        span *= 2
    return h
