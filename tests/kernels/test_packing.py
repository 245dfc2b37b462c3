"""The packed feature map against the unpacked one of the paper."""

import pytest
import torch
from kernel_oracles import moments

from based_megatron.kernels.packing import PackedLayout, packed_rows

CPU = torch.device("cpu")


def test_packed_rows_of_the_released_feature_dim() -> None:
    assert packed_rows(16) == 153


@pytest.mark.parametrize("feature_dim", [1, 2, 8, 16])
def test_packed_product_equals_the_full_feature_map(feature_dim: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, feature_dim, dtype=torch.float64).unbind(0)

    def full(x):  # [1, x / d^(1/4), vec(x x^T) / (sqrt(2) sqrt(d))]: 273 features for d = 16
        outer = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / (2 * feature_dim) ** 0.5
        return torch.cat([torch.ones_like(x[..., :1]), x / feature_dim**0.25, outer], dim=-1)

    layout = PackedLayout.build(feature_dim, CPU, torch.float64)
    packed = (layout.features(q) * layout.weights) @ layout.features(k).T
    torch.testing.assert_close(packed, full(q) @ full(k).T, rtol=1e-13, atol=1e-13)


def test_features_are_plain_moments_in_row_major_pair_order() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(PackedLayout.build(4, CPU, torch.float64).features(x), moments(x))


def test_features_vjp_is_the_gradient_of_features() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    layout = PackedLayout.build(5, CPU, torch.float64)
    features = layout.features(x)
    cotangent = torch.randn_like(features)
    (expected,) = torch.autograd.grad(features, x, cotangent)
    torch.testing.assert_close(layout.features_vjp(x.detach(), cotangent), expected, rtol=1e-13, atol=1e-13)
