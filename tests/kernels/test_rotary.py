"""Rotary embedding: the half-split layout, exact angles, relative positions."""

import math

import pytest
import torch

from based_megatron.errors import ConfigError
from based_megatron.kernels.rotary import apply_rotary, rotary_tables


def test_tables_have_the_known_frequencies() -> None:
    cos, sin = rotary_tables(torch.tensor([0, 3]), head_dim=4, fraction=1.0, base=10000.0, dtype=torch.float64)
    angles = torch.tensor([[0.0, 0.0], [3.0, 0.03]], dtype=torch.float64)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


def test_angles_stay_exact_at_large_positions() -> None:
    position = 2**24 + 3  # not an fp32 number
    _, sin = rotary_tables(torch.tensor([position]), head_dim=8, fraction=1.0, base=10000.0)
    expected = [math.sin(position * 10000.0 ** (-pair / 4)) for pair in range(4)]
    assert sin.dtype == torch.float32
    torch.testing.assert_close(sin[0].double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)


def test_pairs_are_half_split() -> None:
    """Dims r and r + R are rotated together, as complex numbers x_r + i x_{r+R}."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    cos, sin = rotary_tables(torch.arange(5), 8, 1.0, 10000.0, dtype=torch.float64)
    rotated = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)[None, :, None]
    expected = torch.cat([rotated.real, rotated.imag], dim=-1)
    torch.testing.assert_close(apply_rotary(x, cos, sin), expected)


def test_scores_depend_on_relative_positions_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        rotated = [
            apply_rotary(x, *rotary_tables(torch.tensor([position]), 16, 1.0, 10000.0, dtype=torch.float64))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(7, 3), score(1007, 1003))
    assert not torch.isclose(score(7, 3), score(3, 7))


@pytest.mark.parametrize(("fraction", "rotated"), [(0.0, 0), (0.25, 4), (0.5, 8)])
def test_a_fraction_leaves_the_rest_alone(fraction: float, rotated: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 2, 16)
    y = apply_rotary(x, *rotary_tables(torch.arange(1, 4), 16, fraction, 10000.0))
    assert torch.equal(y[..., rotated:], x[..., rotated:])
    assert (y[..., :rotated] != x[..., :rotated]).all()


def test_frequencies_of_a_fraction_span_the_rotated_part() -> None:
    half = rotary_tables(torch.arange(9), 16, 0.5, 10000.0)
    whole = rotary_tables(torch.arange(9), 8, 1.0, 10000.0)
    assert torch.equal(half[0], whole[0]) and torch.equal(half[1], whole[1])


def test_each_row_may_have_its_own_positions() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 1, 8)
    positions = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    together = apply_rotary(x, *rotary_tables(positions, 8, 1.0, 10000.0))
    rows = [apply_rotary(x[i : i + 1], *rotary_tables(positions[i], 8, 1.0, 10000.0)) for i in range(2)]
    assert torch.equal(together, torch.cat(rows))


def test_bf16_is_rounded_once_at_the_end() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 50, 2, 16).to(torch.bfloat16)
    tables = rotary_tables(torch.arange(50), 16, 1.0, 10000.0)
    rotated = apply_rotary(x, *tables)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rotary(x.float(), *tables).to(torch.bfloat16))


def test_an_odd_rotated_part_rotates_one_dim_more_at_its_own_frequencies() -> None:
    """The published 1B transformer: d = 35 of 70 dims, base^(-2r / 35) for r = 0 .. 17."""
    cos, _ = rotary_tables(torch.tensor([1]), 70, 0.5, 10000.0, dtype=torch.float64)
    expected = [math.cos(10000.0 ** (-2 * pair / 35)) for pair in range(18)]
    torch.testing.assert_close(cos[0], torch.tensor(expected, dtype=torch.float64))


def test_a_part_longer_than_the_head_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.rotary_fraction 1\.0 rotates 6 of 5"):
        rotary_tables(torch.arange(2), 5, 1.0, 10000.0)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("head_dim", "fraction"), [(8, 1.0), (16, 0.5), (70, 0.5), (24, 0.0)])
def test_the_kernel_rotates_as_the_reference_does(head_dim: int, fraction: float, per_row: bool) -> None:
    """Values and gradients, of heads inside a fused projection, whose order in memory is kept."""
    torch.manual_seed(0)
    fused = torch.randn(11, 2, 3 * 3 * head_dim, device=DEVICE, requires_grad=True)
    x = fused.chunk(3, dim=-1)[1].transpose(0, 1).unflatten(-1, (3, head_dim))
    positions = torch.arange(5, 16, device=DEVICE)
    tables = rotary_tables(torch.stack([positions, positions + 100]) if per_row else positions, head_dim, fraction, 1e4)
    got, want = apply_rotary(x, *tables, backend="triton"), apply_rotary(x, *tables)
    cotangent = torch.randn(want.shape, device=DEVICE)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, fused, cotangent)[0] for y in (got, want)), rtol=1e-6, atol=1e-6
    )
    assert fraction == 0 or got.transpose(0, 1).is_contiguous()


def test_the_kernel_rounds_bf16_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 70, 1, 112, device=DEVICE).bfloat16()
    tables = rotary_tables(torch.arange(70, device=DEVICE), 112, 1.0, 1e4)
    got, want = apply_rotary(x, *tables, backend="triton"), apply_rotary(x.float(), *tables)
    assert got.dtype == torch.bfloat16
    assert ((got.float() - want).abs() <= want.abs() * 2**-8).all()


@pytest.mark.parametrize(("head_dim", "fraction"), [(112, 1.0), (70, 0.5), (16, 0.5), (8, 0.0)])
def test_the_kernel_makes_the_same_tables(head_dim, fraction):
    """Angles in fp64: at position 1e6 fp32 ones would be off by 0.03."""
    positions = torch.tensor([[0, 1, 77], [4095, 10**6, 10**6 + 1]], device=DEVICE)
    for found, expected in zip(
        rotary_tables(positions, head_dim, fraction, 1e4, backend="triton"),
        rotary_tables(positions, head_dim, fraction, 1e4),
        strict=True,
    ):
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert torch.allclose(found, expected, rtol=0, atol=2e-7)
