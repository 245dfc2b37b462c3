"""The convolution of the Mamba mixers equals a loop over tokens and taps, with inputs in front, and within documents."""

import pytest
import torch
from recurrences import gradients, some_ids
from torch import Tensor
from torch.nn import functional

from based_megatron.baselines.operations.short_convolution import short_convolution

B, T, C = 3, 9, 4


def by_loop(u: Tensor, taps: Tensor, bias: Tensor, halo: Tensor | None, ids: Tensor | None) -> Tensor:
    K, rows = taps.shape[1], []
    for b in range(B):
        for t in range(T):
            total = bias
            for lag in range(K):
                s = t - lag
                other = None if s < 0 and halo is None else (u[b, s] if s >= 0 else halo[b, K - 1 + s])  # type: ignore[index]
                same = ids is None or ids[b, max(s, 0)] == ids[b, t]
                if other is not None and same:
                    total = total + taps[:, K - 1 - lag] * other
            rows.append(functional.silu(total))
    return torch.stack(rows).view(B, T, C)


@pytest.mark.parametrize("taps", [1, 2, 4, 12])
@pytest.mark.parametrize("has_halo", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_it_equals_the_loop(taps, has_halo, packed):
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, T, C), (C, taps), (C,), (B, taps - 1, C))
    u, w, bias, halo = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    ids = some_ids(B, T) if packed else None
    found = short_convolution(u, w, bias, halo_BhC=halo if has_halo else None, document_ids_BT=ids)
    expected = by_loop(u, w, bias, halo if has_halo else None, ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = (u, w, bias)
    torch.testing.assert_close(gradients((found,), wanted), gradients((expected,), wanted), rtol=1e-12, atol=1e-12)
