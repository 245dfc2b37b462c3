"""Sums of squares over stretches of a flat tensor."""

import pytest
import torch
from kernel_oracles import DEVICE

from based_megatron.kernels import square_sum as package
from based_megatron.kernels.square_sum import square_sum, stretches

BACKENDS = ("reference", "triton")
RANGES = {
    "all": [(0, 5000)],
    "one element": [(4999, 5000)],
    "unaligned": [(3, 17), (18, 2100), (4097, 4999)],
    "none": [],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_in_a_range_counts_once(backend: str, ranges: list, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(package, "LONGEST", 1024)
    torch.manual_seed(0)
    x = torch.randn(5000, device=DEVICE).to(dtype)
    counts = torch.zeros(5000, dtype=torch.bool, device=DEVICE)
    for first, end in ranges:
        counts[first:end] = True
    found = square_sum(x, stretches(ranges, DEVICE), backend=backend)
    assert found.dtype == torch.float64 and found.shape == ()
    assert float(found) == pytest.approx(float((x.double().square() * counts).sum()), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_outside_may_be_anything(backend: str) -> None:
    x = torch.full((100,), torch.nan, device=DEVICE)
    x[20:30] = 2.0
    assert float(square_sum(x, stretches([(20, 30)], DEVICE), backend=backend)) == 40


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_seen(backend: str, bad: float) -> None:
    x = torch.ones(3000, device=DEVICE)
    x[2999] = bad
    assert not square_sum(x, stretches([(0, 3000)], DEVICE), backend=backend).isfinite()


def test_stretches_are_short_and_cover_the_ranges_once() -> None:
    longest = package.LONGEST
    cut = stretches([(longest + 5, 3 * longest), (0, 7), (7, 9), (20, 20)]).tolist()
    assert cut == [[0, 9], [longest + 5, 2 * longest + 5], [2 * longest + 5, 3 * longest]]
