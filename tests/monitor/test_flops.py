import dataclasses

import pytest

from based_megatron.config import ModelConfig, load_config
from based_megatron.monitor.flops import parameter_breakdown, parameter_count, peak_flops, training_flops_per_token

TINY = ModelConfig(
    hidden_size=8, ffn_hidden_size=16, num_heads=2, feature_dim=3, window_left=2, vocab_size=10, vocab_multiple=4
)


def tiny(**changes) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    "preset, parameters",
    [
        ("based-360m", 362_620_928),
        ("based-1b", 1_349_453_056),
        ("transformer-360m", 359_810_048),
        ("transformer-1b", 1_327_080_720),
    ],
)
def test_totals_of_the_published_models(preset, parameters):
    assert parameter_count(load_config(preset).model) == parameters


def test_breakdown_of_the_published_360m():
    assert parameter_breakdown(load_config("based-360m").model) == {
        "embedding": 51_470_336,
        "gated_conv": 17 * 6_302_720,
        "linear_attention": 5 * 2_621_440,
        "sliding_window": 5 * 4_194_304,
        "mlp": 27 * 6_291_456,
        "norms": 56_320,
    }


def test_untied_output_has_parameters_of_its_own():
    rows = 12  # 10 rounded up to a multiple of 4
    tied, untied = tiny(layer_pattern="S"), tiny(layer_pattern="S", tie_embeddings=False)
    assert parameter_count(untied) - parameter_count(tied) == rows * 8


def test_untied_embedding_costs_no_operations():
    tied, untied = tiny(layer_pattern="S"), tiny(layer_pattern="S", tie_embeddings=False)
    assert training_flops_per_token(tied, 16) == training_flops_per_token(untied, 16)


@pytest.mark.parametrize("preset, flops", [("based-360m", 2.201e9), ("based-1b", 8.159e9)])
def test_operations_of_the_published_models(preset, flops):
    """Within half a percent of 6 x all parameters + 3 x mixers, which counts norms too and full windows everywhere."""
    assert training_flops_per_token(load_config(preset).model, 2048) == pytest.approx(flops, rel=5e-3)


def mixing_flops(model: ModelConfig, linear_weights: int, length: int = 16) -> float:
    """Forward operations of the mixer beside its linear layers, from the total of a model with one layer."""
    elsewhere = 12 * 8 + 3 * 8 * 16
    return (training_flops_per_token(model, length) - 6 * (elsewhere + linear_weights)) / 3


def test_gated_conv_is_two_operations_a_tap():
    # 16 channels, 3 taps; projections 8 -> 32 and 16 -> 8
    assert mixing_flops(tiny(layer_pattern="c"), 8 * 32 + 16 * 8) == pytest.approx(2 * 3 * 16)


def test_linear_attention_writes_and_reads_its_state():
    # 2 heads of a state with 1 + 3 + 9 features and 4 + 1 columns; q and k 8 -> 6, v and o 8 -> 8
    assert mixing_flops(tiny(layer_pattern="L"), 2 * 8 * 6 + 2 * 8 * 8) == pytest.approx(4 * 2 * 13 * 5)


def test_rebased_attention_has_squares_alone():
    rebased = tiny(layer_pattern="L", feature_map="rebased")
    assert mixing_flops(rebased, 2 * 8 * 6 + 2 * 8 * 8) == pytest.approx(4 * 2 * 9 * 5)
    # A scale and a shift for each of 2 x 6 features of queries and keys.
    assert parameter_count(rebased) - parameter_count(tiny(layer_pattern="L")) == 2 * 2 * 6


def test_linear_attention_does_not_depend_on_the_length():
    model = tiny(layer_pattern="L")
    assert training_flops_per_token(model, 16) == training_flops_per_token(model, 1 << 20)


@pytest.mark.parametrize("pattern, visible", [("S", [1, 2, 3, 3, 3]), ("A", [1, 2, 3, 4, 5])])
def test_attention_averages_the_visible_keys(pattern, visible):
    expected = 4 * 8 * sum(visible) / len(visible)
    assert mixing_flops(tiny(layer_pattern=pattern), 4 * 8 * 8, length=5) == pytest.approx(expected)


def test_window_longer_than_the_sequence_is_full_attention():
    window, full = tiny(layer_pattern="S", window_left=50), tiny(layer_pattern="A")
    assert training_flops_per_token(window, 16) == training_flops_per_token(full, 16)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A10", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_peak_of_a_device(name, peak):
    assert peak_flops(name) == peak
