"""The presets are the released recipes, number by number, and the published baselines."""

import pytest
import torch

from based_megatron.config import load_config, preset_names
from based_megatron.config.pattern import parse_layer_pattern
from based_megatron.kernels.rotary import rotary_tables
from based_megatron.monitor.flops import parameter_count

RELEASED = ["based-360m", "based-1b", "based-1b-50b"]

ARCHITECTURE = {
    # hidden size, MLP, layers, linear attention layers, window layers
    "based-360m": (1024, 2048, 27, [1, 6, 11, 16, 21], [2, 7, 12, 17, 22]),
    "based-1b": (1792, 3584, 36, [1, 6, 11, 16, 21, 27, 33], [2, 7, 12, 17, 22, 28, 34]),
    "based-1b-50b": (1792, 3584, 36, [1, 6, 11, 16, 21, 27, 33], [2, 7, 12, 17, 22, 28, 34]),
}

RUNS = {
    # steps, warmup, cosine, micro batch
    "based-360m": (20_000, 200, 19_800, 8),
    "based-1b": (20_000, 200, 19_800, 4),
    "based-1b-50b": (100_000, 1_000, 99_000, 8),
}

PARAMETERS = {
    "based-360m": 362_620_928,
    "based-1b": 1_349_453_056,
    "based-1b-50b": 1_349_453_056,
    "transformer-360m": 359_810_048,
    "transformer-1b": 1_327_080_720,
}


@pytest.mark.parametrize("name", RELEASED)
def test_architectures_are_as_released(name):
    model = load_config(name).model
    layers = parse_layer_pattern(model.layer_pattern)
    linear, window = ([i for i, letter in enumerate(layers) if letter == kind] for kind in "LS")
    assert (model.hidden_size, model.ffn_hidden_size, len(layers), linear, window) == ARCHITECTURE[name]
    assert set(layers) == set("cLS")
    assert (model.num_heads, model.feature_dim, model.window_left) == (16, 16, 128)
    assert (model.conv_kernel, model.conv_expand) == (3, 4)
    assert (model.rotary_base, model.rotary_fraction, model.norm_eps) == (1e4, 1.0, 1e-5)
    assert (model.vocab_size, model.vocab_multiple, model.tie_embeddings, model.init_std) == (50257, 8, True, 0.02)


@pytest.mark.parametrize("name", [*RELEASED, "transformer-360m", "transformer-1b"])
def test_optimizers_are_as_released(name):
    config = load_config(name)
    optimizer, schedule = config.optimizer, config.schedule
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps) == (8e-4, 0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.weight_decay_mode, optimizer.clip_grad_norm) == (0.1, "reference", 1.0)
    assert (schedule.warmup_lr, schedule.min_lr) == (1e-6, 8e-5)
    assert (config.train.seed, config.train.precision, config.data.seed) == (1111, "bf16", 42)


@pytest.mark.parametrize("name", RELEASED)
def test_lengths_and_batches_are_as_released(name):
    config = load_config(name)
    train, schedule = config.train, config.schedule
    found = (train.steps, schedule.warmup_steps, schedule.decay_steps, train.micro_batch_sequences)
    assert found == RUNS[name]
    assert schedule.warmup_steps + schedule.decay_steps == train.steps
    assert (train.global_batch_sequences, config.data.sequence_length_tokens) == (256, 2048)
    assert not config.data.isolate_documents, "the released runs did not reset at documents"
    assert (config.validation.interval_steps, config.validation.sequences) == (1000, 1000)
    assert config.checkpoint.interval_steps == 1000


@pytest.mark.parametrize(
    ("name", "hidden", "heads", "layers", "mlp"),
    [("transformer-360m", 1024, 16, 24, 2816), ("transformer-1b", 1680, 24, 36, 4608)],
)
def test_baselines_are_as_published(name, hidden, heads, layers, mlp):
    model = load_config(name).model
    found = (model.hidden_size, model.num_heads, parse_layer_pattern(model.layer_pattern), model.ffn_hidden_size)
    assert found == (hidden, heads, "A" * layers, mlp)
    assert (model.rotary_fraction, model.vocab_multiple) == (0.5, 16)


MATCHED = {
    # letter and number of layers
    "mamba-360m": ("M", 46),
    "retnet-360m": ("R", 24),
}


@pytest.mark.parametrize("name", MATCHED)
def test_baselines_have_as_many_parameters_as_based(name):
    config, based = load_config(name), load_config("based-360m")
    letter, layers = MATCHED[name]
    assert parse_layer_pattern(config.model.layer_pattern) == letter * layers
    assert parameter_count(config.model) == pytest.approx(PARAMETERS["based-360m"], rel=0.02)
    assert (config.optimizer, config.schedule, config.data) == (based.optimizer, based.schedule, based.data)


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_numbers_of_parameters(name):
    assert parameter_count(load_config(name).model) == PARAMETERS[name]


def test_the_stages_of_the_7b_are_whole_periods():
    """Equal stages: each of the 4 x 2 chunks is one cLScc."""
    config = load_config("based-7b")
    layers = parse_layer_pattern(config.model.layer_pattern)
    chunks = config.parallel.pipeline * config.parallel.virtual_pipeline
    assert layers == "cLScc" * chunks


@pytest.mark.parametrize("name", preset_names())
def test_the_heads_of_presets_can_be_rotated(name):
    model = load_config(name).model
    head_dim = model.hidden_size // model.num_heads
    rotary_tables(torch.arange(2), head_dim, model.rotary_fraction, model.rotary_base)
