"""Packed features of second order, and their layout: those of the Taylor map (Based), or the squares alone (ReBased).

Legend: F feature dim, R rows of a packed state, `...` any leading dims.

    Taylor    w(q, k) = 1 + s + s^2/2     packed(x) = [1 | x_a | x_a x_b for a <= b]     R = 1 + F + F(F+1)/2
    square    w(q, k) = s^2               packed(x) = [x_a x_b for a <= b]               R = F(F+1)/2

with s = q.k / sqrt(F), and w(q, k) = (weights_R * packed(q)) . packed(k). All weights (1, 1/sqrt(F), 1/(2F) on the diagonal and
1/F off it, where one entry stands for both orders; twice these for squares alone) are on the query side, so that a state is a
plain moment sum_j packed(k_j) v_j^T: exact to split, add and send.

s^2 may be 0 for every key that a token sees, so a normaliser of squares gets an epsilon; that of the Taylor map needs none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SQUARE_EPSILON = 1e-5
"""Added to normalisers of squares alone (arXiv 2402.10644)."""


def packed_rows(feature_dim: int, square: bool = False) -> int:
    """R, the number of packed features: 153 for feature_dim 16, where the unpacked map has 273; 136 squares."""
    pairs = feature_dim * (feature_dim + 1) // 2
    return pairs if square else 1 + feature_dim + pairs


@dataclass(frozen=True)
class PackedLayout:
    """The place of each feature: pair p is the product of features first[p] <= second[p]."""

    first: Tensor
    second: Tensor
    weights: Tensor
    """[R], factors that turn packed(q) . packed(k) into w."""
    square: bool

    @classmethod
    def build(cls, feature_dim: int, device: torch.device, dtype: torch.dtype, square: bool = False) -> PackedLayout:
        """The layout for one feature dim; `dtype` is that of the weights."""
        F, pair_weight = feature_dim, (2 if square else 1) / feature_dim
        first, second = torch.triu_indices(F, F, device=device).unbind(0)
        weights_R = torch.full((packed_rows(F, square),), pair_weight, dtype=dtype, device=device)
        # Filled in place: assigning a number would copy it from the host, which a CUDA graph cannot capture.
        weights_R[-len(first) :].masked_fill_(first == second, pair_weight / 2)
        if not square:
            weights_R[:1].fill_(1)
            weights_R[1 : 1 + F].fill_(F**-0.5)
        return cls(first, second, weights_R, square)

    def features(self, x: Tensor) -> Tensor:
        """packed(x): [..., F] to [..., R], without weights."""
        pairs = x[..., self.first] * x[..., self.second]
        return pairs if self.square else torch.cat([x.new_ones(*x.shape[:-1], 1), x, pairs], dim=-1)

    def features_vjp(self, x: Tensor, grad_packed: Tensor) -> Tensor:
        """Gradient of a loss to x [..., F], from its gradient to features(x) [..., R]."""
        F = x.shape[-1]
        grad_pairs = grad_packed[..., -len(self.first) :]
        # A matrix product with one-hot rows adds the pairs up in a fixed order; index_add_ on a GPU would not.
        to_first, to_second = (functional.one_hot(index, F).to(x.dtype) for index in (self.first, self.second))
        through_first = (grad_pairs * x[..., self.second]) @ to_first
        through_second = (grad_pairs * x[..., self.first]) @ to_second
        through_pairs = through_first + through_second
        return through_pairs if self.square else grad_packed[..., 1 : 1 + F] + through_pairs
