"""Sums of rows, written over a total or added to it."""

import pytest
import torch
from kernel_oracles import DEVICE

from based_megatron.kernels.column_sum import column_sum

BACKENDS = ("reference", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (33, 200), (500, 129), (1000, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adds", [False, True])
def test_every_row_counts_once(backend: str, shape: tuple[int, int], dtype: torch.dtype, adds: bool) -> None:
    torch.manual_seed(shape[0])
    x, before = torch.randn(shape, device=DEVICE).to(dtype), torch.randn(shape[1], device=DEVICE)
    wanted = x.double().sum(0) + (before.double() if adds else 0)
    total = before.clone()
    assert column_sum(x, total, adds=adds, backend=backend) is total
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_lie_apart(backend: str) -> None:
    """As of one half of a fused projection; what lies between is not read."""
    whole = torch.randn(90, 60, device=DEVICE)
    whole[:, 20:] = torch.nan
    total = column_sum(whole[:, :20], torch.empty(20, device=DEVICE), backend=backend)
    torch.testing.assert_close(total, whole[:, :20].sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_total_is_rounded_once(backend: str) -> None:
    """A bf16 total of many small numbers: a sum in bf16 would stand still at 256 times each."""
    x = torch.full((5000, 3), 2**-8, dtype=torch.bfloat16, device=DEVICE)
    total = column_sum(x, torch.zeros(3, dtype=torch.bfloat16, device=DEVICE), backend=backend)
    torch.testing.assert_close(total.float(), torch.full((3,), 5000 / 256, device=DEVICE), rtol=2**-7, atol=0)


def test_the_reference_takes_fp64() -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    assert torch.equal(column_sum(x, torch.zeros(4, dtype=torch.float64)), x.sum(0))
