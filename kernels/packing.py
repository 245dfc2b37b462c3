"""Packed second-order features of the Taylor map, and their layout.

Legend: F feature dim, R = 1 + F + F(F+1)/2 rows of a packed state, `...` any leading dims.

    w(q, k) = 1 + s + s^2/2,  s = q.k / sqrt(F),  equals  (weights_R * packed(q)) . packed(k)
    packed(x) = [1 | x_a | x_a x_b for a <= b]

All weights (1, 1/sqrt(F), 1/(2F) on the diagonal and 1/F off it, where one entry stands for both orders) are on the
query side, so that a state is a plain moment sum_j packed(k_j) v_j^T: exact to split, add and send.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def packed_rows(feature_dim: int) -> int:
    """R, the number of packed features: 153 for feature_dim 16, where the unpacked map has 273."""
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


@dataclass(frozen=True)
class PackedLayout:
    """The place of each feature: pair p is the product of features first[p] <= second[p]."""

    first: Tensor
    second: Tensor
    weights: Tensor
    """[R], factors that turn packed(q) . packed(k) into 1 + s + s^2/2."""

    @classmethod
    def build(cls, feature_dim: int, device: torch.device, dtype: torch.dtype) -> PackedLayout:
        """The layout for one feature dim; `dtype` is that of the weights."""
        F = feature_dim
        first, second = torch.triu_indices(F, F, device=device).unbind(0)
        weights_R = torch.full((packed_rows(F),), 1 / F, dtype=dtype, device=device)
        # Filled in place: assigning a number would copy it from the host, which a CUDA graph cannot capture.
        weights_R[:1].fill_(1)
        weights_R[1 : 1 + F].fill_(F**-0.5)
        weights_R[1 + F :].masked_fill_(first == second, 1 / (2 * F))
        return cls(first, second, weights_R)

    def features(self, x: Tensor) -> Tensor:
        """packed(x): [..., F] to [..., R], without weights."""
        ones = x.new_ones(*x.shape[:-1], 1)
        return torch.cat([ones, x, x[..., self.first] * x[..., self.second]], dim=-1)

    def features_vjp(self, x: Tensor, grad_packed: Tensor) -> Tensor:
        """Gradient of a loss to x [..., F], from its gradient to features(x) [..., R]."""
        F = x.shape[-1]
        _, grad_x, grad_pairs = grad_packed.split([1, F, len(self.first)], dim=-1)
        # A matrix product with one-hot rows adds the pairs up in a fixed order; index_add_ on a GPU would not.
        to_first, to_second = (functional.one_hot(index, F).to(x.dtype) for index in (self.first, self.second))
        through_first = (grad_pairs * x[..., self.second]) @ to_first
        through_second = (grad_pairs * x[..., self.first]) @ to_second
        return grad_x + through_first + through_second
