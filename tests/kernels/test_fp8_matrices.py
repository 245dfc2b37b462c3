"""Matrices in e4m3: their scales, their numbers to the last bit, what they do with the numbers that do not fit, and their products."""

import pytest
import torch
from kernel_oracles import DEVICE
from torch import Tensor

from based_megatron.kernels.fp8 import Fp8Matrix, quantised_rows, quantised_rows_and_sum, scaled_product, turned

BACKENDS = ("reference", "triton")
MANTISSA_BITS, LEAST_EXPONENT, LARGEST = 3, -6, 448.0


def rounded(x: Tensor) -> Tensor:
    """The nearest number of e4m3, ties to even, written from the definition of the format: fp64 in, fp64 out."""
    exponent = (torch.frexp(x).exponent - 1).clamp(min=LEAST_EXPONENT)
    step = torch.exp2(exponent.double() - MANTISSA_BITS)
    return (x / step).round() * step


def oracle_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers, scales) in fp64: the exponent is looked for, not computed."""
    scales = []
    for row in x.double():
        exponent = -100
        while row.abs().max() > LARGEST * 2.0**exponent:
            exponent += 1
        scales.append(2.0**exponent)
    scale = torch.tensor(scales, dtype=torch.float64)
    return rounded(x.double() / scale[:, None]), scale


def rows_of_all_sizes(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose sizes differ by 2^40, one of zeros, one at the edge of a scale, and one beyond it by a bit."""
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator) * torch.exp2(
        torch.randint(-20, 20, (rows, 1), generator=generator)
    )
    x[0] = 0
    if rows > 2:
        x[1], x[2] = 0.1, 0.1
        x[1, -1], x[2, 0] = 448.0, -450.0
    return x.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 48), (130, 70), (3, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_to_the_nearest_numbers(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = rows_of_all_sizes(*shape, dtype)
    numbers, scale, largest = quantised_rows(x.to(DEVICE), backend=backend)
    assert largest is not None and float(largest.max()) == float(scale.max())
    wanted, wanted_scale = oracle_rows(x)
    assert numbers.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert torch.equal(scale.cpu().double(), wanted_scale)
    assert torch.equal(numbers.cpu().double(), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 48), (130, 70)])
def test_the_sum_of_rows_comes_with_the_same_numbers(backend: str, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(DEVICE, torch.bfloat16)
    rows, total = quantised_rows_and_sum(x, backend=backend)
    wanted = quantised_rows(x, backend=backend)
    assert torch.equal(rows.numbers.view(torch.uint8), wanted.numbers.view(torch.uint8))
    assert torch.equal(rows.scale, wanted.scale)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), x.double().sum(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (33, 48), (130, 70), (256, 130)])
@pytest.mark.parametrize("weighted", [False, True])
def test_turned_rows_share_the_largest_scale(backend: str, shape: tuple[int, int], weighted: bool) -> None:
    x = rows_of_all_sizes(*shape)
    numbers, scale = oracle_rows(x)
    weight = torch.exp2(torch.arange(shape[0]) % 5 - 2.0) if weighted else None
    weight = None if weight is None else weight.to(DEVICE)
    rows = quantised_rows(x.to(DEVICE), weight, backend=backend)
    found = turned(rows, weight, backend=backend)
    whole = scale if weight is None else scale * weight.double().cpu()
    common = max(float(whole.max()), 2.0**-120)
    assert found.scale.tolist() == [common] * shape[1]
    wanted = rounded(numbers * (whole / common)[:, None]).t()
    columns = -(-shape[0] // 16) * 16
    assert found.numbers.shape == (shape[1], columns) and found.numbers.is_contiguous()
    assert torch.equal(found.numbers.cpu().double()[:, : shape[0]], wanted)
    assert not found.numbers[:, shape[0] :].float().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_under_one_scale_are_turned_as_they_are(backend: str) -> None:
    numbers, scale = oracle_rows(rows_of_all_sizes(37, 70))[0].to(torch.float8_e4m3fn), torch.tensor(8.0)
    found = turned(Fp8Matrix(numbers.to(DEVICE), scale.to(DEVICE)), backend=backend)
    assert float(found.scale) == 8
    assert torch.equal(found.numbers[:, :37].cpu().double(), numbers.double().t())
    assert found.numbers.shape == (70, 48) and not found.numbers[:, 37:].float().any()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of NumPy, in the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_number_that_is_not_finite_is_not_hidden(backend: str, bad: float) -> None:
    """A saturating cast would make 448 of it, and the guard against bad steps would not see it."""
    x = torch.ones(32, 16, device=DEVICE)
    x[7, 3] = bad
    rows = quantised_rows(x, backend=backend)
    y = scaled_product(rows, quantised_rows(torch.ones(16, 16, device=DEVICE)), dtype=torch.bfloat16)
    assert not y[7].isfinite().any() and y[6].isfinite().all()
    other = turned(quantised_rows(torch.ones(32, 16, device=DEVICE))).under_one_scale()
    total = scaled_product(turned(rows, backend=backend).under_one_scale(), other, dtype=torch.float32)
    assert not total[3].isfinite().any()


def some(rows: int, columns: int, seed: int) -> Fp8Matrix:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.exp2(
        torch.randint(-3, 3, (rows, 1), generator=generator)
    )
    return quantised_rows(x.to(DEVICE))


def exact(matrix: Fp8Matrix) -> Tensor:
    return matrix.numbers.double() * matrix.scale.double().reshape(-1, 1)


@pytest.mark.parametrize("one_scale", ["neither", "second", "both"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_the_numbers(one_scale: str, has_bias: bool) -> None:
    a, b = some(48, 160, 1), some(32, 160, 2)
    a = Fp8Matrix(a.numbers, a.scale.max()) if one_scale == "both" else a
    b = Fp8Matrix(b.numbers, b.scale.max()) if one_scale != "neither" else b
    bias = torch.randn(32, device=DEVICE).bfloat16() if has_bias else None
    found = scaled_product(a, b, bias, dtype=torch.bfloat16)
    wanted = exact(a) @ exact(b).t() + (0 if bias is None else bias.double())
    assert found.dtype == torch.bfloat16 and found.shape == (48, 32)
    assert (found.double() - wanted).norm() / wanted.norm() < 2**-8


@pytest.mark.parametrize("offset", [0, 1])
def test_a_product_is_written_where_it_belongs(offset: int) -> None:
    """Tensor cores write to whole lines of 16 bytes only."""
    a, b = (Fp8Matrix(x.numbers, x.scale.max()) for x in (some(48, 160, 1), some(32, 160, 2)))
    room = torch.zeros(offset + 48 * 32, device=DEVICE)
    found = scaled_product(a, b, dtype=torch.float32, out=room[offset:].view(48, 32))
    assert found.data_ptr() == room.data_ptr() + 4 * offset
    wanted = exact(a) @ exact(b).t()
    assert (room[offset:].view(48, 32).double() - wanted).norm() / wanted.norm() < 3e-4
