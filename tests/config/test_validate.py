"""Every combination that cannot run is refused in one line with the values and the key; legal ones at the limits pass."""

import math
from typing import Any

import pytest
from config_changes import changed, legal

from based_megatron.config import Config, SourceConfig
from based_megatron.config.pattern import parse_layer_pattern
from based_megatron.config.validate import check_run_dir, data_parallel_size, validate, validated_sequences
from based_megatron.errors import ConfigError
from based_megatron.model.check import check_mixers

AT_LEAST_ONE = [
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_heads",
    "model.feature_dim",
    "model.conv_expand",
    "model.vocab_size",
    "model.vocab_multiple",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "parallel.zero_bucket_elements",
    "parallel.timeout_seconds",
    "train.steps",
    "train.global_batch_sequences",
    "train.micro_batch_sequences",
    "data.sequence_length_tokens",
    "monitor.log_interval_steps",
]

# (changes to `tiny`: 8 layers, 4 heads of 32, 256 tokens, global batch 16 of micro batches of 4), world size, what the line must say.
REFUSED: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "no data": ({"data.path": ""}, 1, ["data.path", "''", "0 sources"]),
    "two kinds of data": ({"data.sources": (SourceConfig("a"),)}, 1, ["data.path", "'corpus'", "1 sources"]),
    "validation without sequences": ({"validation.sequences": 0}, 1, ["validation.sequences is 0"]),
    "rate zero": ({"optimizer.lr": 0.0}, 1, ["optimizer.lr is 0.0", "above 0"]),
    "rate not a number": ({"optimizer.lr": math.nan}, 1, ["optimizer.lr is nan"]),
    "momentum of one": ({"optimizer.muon.momentum": 1.0}, 1, ["optimizer.muon.momentum is 1.0"]),
    "no iteration": ({"optimizer.muon.newton_schulz_steps": 0}, 1, ["optimizer.muon.newton_schulz_steps is 0"]),
    "updates of no size": ({"optimizer.muon.update_rms": 0.0}, 1, ["optimizer.muon.update_rms is 0.0"]),
    "rate below its end": ({"optimizer.lr": 1e-5}, 1, ["schedule.min_lr 0.0003", "optimizer.lr 1e-05"]),
    "decay of all": ({"optimizer.weight_decay": 1e9}, 1, ["optimizer.lr 0.003 x optimizer.weight_decay 1000000000.0"]),
    "adam without eps": ({"optimizer.eps": 0.0}, 1, ["optimizer.eps is 0.0"]),
    "stop file elsewhere": (
        {"train.stop_file": "/etc/passwd"},
        1,
        ["train.stop_file is '/etc/passwd'", "plain file name"],
    ),
    "stop file of ours": ({"train.stop_file": "events.jsonl"}, 1, ["train.stop_file is 'events.jsonl'"]),
    "no stop file": ({"train.stop_file": ""}, 1, ["train.stop_file is ''"]),
    "muon with apex": (
        {"optimizer.name": "muon", "optimizer.implementation": "apex"},
        1,
        ["optimizer.implementation apex", "optimizer.name muon", "to auto"],
    ),
    "muon with zero 3": (
        {"optimizer.name": "muon", "parallel.zero_stage": 3},
        1,
        ["optimizer.name muon", "parallel.zero_stage 3", "to 1 or 2"],
    ),
    "beta1 of one": ({"optimizer.beta1": 1.0}, 1, ["optimizer.beta1 is 1.0"]),
    "beta2 below zero": ({"optimizer.beta2": -0.1}, 1, ["optimizer.beta2 is -0.1"]),
    "eps below zero": ({"optimizer.eps": -1e-8}, 1, ["optimizer.eps is -1e-08"]),
    "weight decay below zero": ({"optimizer.weight_decay": -0.1}, 1, ["optimizer.weight_decay is -0.1"]),
    "clip below zero": ({"optimizer.clip_grad_norm": -0.5}, 1, ["optimizer.clip_grad_norm is -0.5"]),
    "pattern letter": ({"model.layer_pattern": "cX*4"}, 1, ["'X'", "'cX*4'", "model.layer_pattern"]),
    "pattern empty": ({"model.layer_pattern": " "}, 1, ["empty", "model.layer_pattern"]),
    "prefix of all": (
        {"model.prefix_tokens": 64, "data.sequence_length_tokens": 64},
        1,
        ["model.prefix_tokens 64", "data.sequence_length_tokens 64"],
    ),
    "prefix over slices": (
        {"model.prefix_tokens": 8, "parallel.context": 2},
        2,
        ["parallel.context 2", "parallel.context=1"],
    ),
    "prefix without a mask": (
        {
            "model.prefix_tokens": 8,
            "model.vocab_size": 64,
            "model.vocab_multiple": 8,
            "monitor.sample_interval_steps": 0,
        },
        1,
        ["train.prefix_mask_token 0", "64 rows"],
    ),
    "fp8 and tensor": (
        {"train.precision": "fp8", "parallel.tensor": 2},
        2,
        ["train.precision fp8", "parallel.tensor 2", "set train.precision=bf16"],
    ),
    "fp8 of a word": ({"train.precision": "fp8", "train.fp8_layers": "all"}, 1, ["'all'", "train.fp8_layers"]),
    "fp8 of no layer": (
        {"train.precision": "fp8", "train.fp8_layers": "5:5"},
        1,
        ["'5:5'", "none of", "train.fp8_layers"],
    ),
    "rebased": (
        {"model.feature_map": "rebased", "model.feature_dim": 1},
        1,
        ["model.feature_dim 1", "model.feature_map rebased"],
    ),
    "heads": ({"model.hidden_size": 130}, 1, ["model.hidden_size 130", "model.num_heads 4"]),
    "expand odd": ({"model.conv_expand": 3}, 1, ["model.conv_expand is 3"]),
    "window below zero": ({"model.window_left": -1}, 1, ["model.window_left is -1"]),
    "no taps": ({"model.conv_kernel": 0}, 1, ["model.conv_kernel is 0"]),
    "rotary none": ({"model.rotary_fraction": 0.0}, 1, ["model.rotary_fraction is 0.0"]),
    "rotary too much": ({"model.rotary_fraction": 1.01}, 1, ["model.rotary_fraction is 1.01"]),
    "tensor and heads": ({"parallel.tensor": 8}, 8, ["model.num_heads 4", "parallel.tensor 8"]),
    "tensor and mlp": (
        {"parallel.tensor": 4, "model.ffn_hidden_size": 254},
        4,
        ["model.ffn_hidden_size 254", "parallel.tensor 4"],
    ),
    "world size": (
        {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.context": 2},
        12,
        ["world size 12", "tensor 2 x pipeline 2 x context 2 = 8", "parallel.tensor"],
    ),
    "world too small": ({"parallel.tensor": 4}, 2, ["world size 2", "tensor 4"]),
    "batch": (
        {"train.global_batch_sequences": 20},
        2,
        ["train.global_batch_sequences 20", "train.micro_batch_sequences 4", "data parallel 2 = 8"],
    ),
    "virtual without pipeline": ({"parallel.virtual_pipeline": 2}, 1, ["parallel.virtual_pipeline 2"]),
    "more stages than layers": (
        {"parallel.pipeline": 9},
        9,
        ["8 layers", "parallel.pipeline 9 x parallel.virtual_pipeline 1 = 9"],
    ),
    "chunks uneven": (
        {"parallel.pipeline": 2, "parallel.virtual_pipeline": 3},
        2,
        ["8 layers", "parallel.pipeline 2 x parallel.virtual_pipeline 3 = 6", "model.layer_pattern"],
    ),
    "interleaved micro batches": (
        {"parallel.pipeline": 4, "parallel.virtual_pipeline": 2, "train.global_batch_sequences": 24},
        4,
        ["parallel.pipeline 4", "not 6", "train.global_batch_sequences"],
    ),
    "context longer than the sequence": (
        {"parallel.context": 512},
        512,
        ["parallel.context 512", "data.sequence_length_tokens 256"],
    ),
    "sequence parallel does not divide": (
        {"parallel.tensor": 4, "data.sequence_length_tokens": 250},
        4,
        ["data.sequence_length_tokens 250", "parallel.tensor 4", "parallel.sequence_parallel=false"],
    ),
    "slices too short for sequence parallel": (
        {"parallel.tensor": 4, "parallel.context": 4, "data.sequence_length_tokens": 12},
        16,
        ["data.sequence_length_tokens 12", "4 slices", "parallel.tensor 4"],
    ),
    "carried states of a mixture": (
        {"data.carry_state": True, "data.path": "", "data.sources": (SourceConfig("a"), SourceConfig("b"))},
        1,
        ["data.carry_state", "2 data.sources"],
    ),
    "carried states without documents": (
        {"data.carry_state": True, "data.isolate_documents": False},
        1,
        ["data.carry_state", "data.isolate_documents False"],
    ),
    "carried states of full attention": (
        {"data.carry_state": True, "model.layer_pattern": "cLSA"},
        1,
        ["data.carry_state", "model.layer_pattern", "A"],
    ),
    "zero 0": ({"parallel.zero_stage": 0}, 1, ["parallel.zero_stage 0", "parallel.zero_stage=1"]),
    "zero 4": ({"parallel.zero_stage": 4}, 1, ["parallel.zero_stage is 4"]),
    "zero below 0": ({"parallel.zero_stage": -1}, 1, ["parallel.zero_stage is -1"]),
    "zero 2 and pipeline": (
        {"parallel.zero_stage": 2, "parallel.pipeline": 2},
        2,
        ["parallel.zero_stage 2", "parallel.pipeline 2", "parallel.zero_stage=1"],
    ),
    "zero 3 and pipeline": ({"parallel.zero_stage": 3, "parallel.pipeline": 2}, 2, ["parallel.zero_stage 3"]),
    "zero 3 and apex": (
        {"parallel.zero_stage": 3, "optimizer.implementation": "apex"},
        1,
        ["optimizer.implementation apex", "parallel.zero_stage 3"],
    ),
}

LEGAL: dict[str, tuple[dict[str, Any], int]] = {
    "as it is": ({}, 1),
    "mixture": ({"data.path": "", "data.sources": (SourceConfig("a"), SourceConfig("b"))}, 1),
    "validation off": ({"validation.interval_steps": 0, "validation.sequences": 0}, 1),
    "clipping off": ({"optimizer.clip_grad_norm": 0.0}, 1),
    "no momentum": ({"optimizer.beta1": 0.0, "optimizer.beta2": 0.0}, 1),
    "window of itself": ({"model.window_left": 0, "model.conv_kernel": 1}, 1),
    "every head on its own rank": ({"parallel.tensor": 4}, 4),
    "a layer for each stage": ({"parallel.pipeline": 8}, 8),
    "uneven stages": ({"parallel.pipeline": 3}, 3),
    "a layer for each chunk": ({"parallel.pipeline": 4, "parallel.virtual_pipeline": 2}, 4),
    "interleaved, as many micro batches as stages": (
        {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "train.global_batch_sequences": 8},
        2,
    ),
    "a token for each context rank": ({"parallel.context": 256}, 256),
    "odd length without sequence parallelism": (
        {"parallel.tensor": 4, "parallel.sequence_parallel": False, "data.sequence_length_tokens": 251},
        4,
    ),
    "odd vocabulary": ({"parallel.tensor": 2, "model.vocab_size": 4097, "model.vocab_multiple": 1}, 2),
    "one micro batch": ({}, 4),
    "zero 2 and 3": ({"parallel.zero_stage": 3, "parallel.context": 2, "parallel.tensor": 2}, 4),
    "zero 2 and apex": ({"parallel.zero_stage": 2, "optimizer.implementation": "apex"}, 2),
}

PRESETS = [
    ("tiny", 1),
    ("tiny", 4),
    ("based-360m", 8),
    ("based-360m", 32),
    ("based-1b", 8),
    ("based-1b", 64),
    ("based-1b-50b", 16),
    ("transformer-360m", 8),
    ("transformer-1b", 8),
    ("based-7b", 64),
    ("based-7b", 128),
]


def check(config: Config, world_size: int) -> None:
    """All that is checked before ranks start to work."""
    validate(config, world_size)
    check_mixers(config)


def refusal(changes: dict[str, Any], world_size: int) -> str:
    with pytest.raises(ConfigError) as error:
        check(changed(legal(), changes), world_size)
    return str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_in_one_line(name):
    changes, world_size, expected = REFUSED[name]
    line = refusal(changes, world_size)
    assert "\n" not in line
    for text in expected:
        assert text in line


@pytest.mark.parametrize("value", [0, -2])
@pytest.mark.parametrize("key", AT_LEAST_ONE)
def test_sizes_and_counts_are_at_least_one(key, value):
    assert f"{key} is {value}" in refusal({key: value}, 1)


@pytest.mark.parametrize("name", LEGAL)
def test_what_can_run_passes(name):
    changes, world_size = LEGAL[name]
    check(changed(legal(), changes), world_size)


@pytest.mark.parametrize(("preset", "world_size"), PRESETS)
def test_presets_can_run(preset, world_size):
    check(legal(preset), world_size)


def test_the_7b_preset_needs_sixteen_ranks_a_replica():
    with pytest.raises(ConfigError, match="tensor 4 x pipeline 4 x context 1 = 16"):
        validate(legal("based-7b"), 24)


def test_data_parallel_takes_what_is_left():
    parallel = changed(legal(), {"parallel.tensor": 2, "parallel.pipeline": 3, "parallel.context": 5}).parallel
    assert data_parallel_size(parallel, 60) == 2


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [("c", "c"), ("cLS*2 cc", "cLScLScc"), ("  A*3\n", "AAA"), ("cL S*10", "cL" + "S" * 10)],
)
def test_layer_pattern_expands(pattern, expanded):
    assert parse_layer_pattern(pattern) == expanded


@pytest.mark.parametrize(
    "pattern", ["", "*3", "c*0", "c*-1", "c3", "cL*", "cL,S", "c*2*3", "c*999999999", "c*99999999999", "c*10001"]
)
def test_layer_pattern_refuses_what_it_cannot_read(pattern):
    with pytest.raises(ConfigError, match=r"model\.layer_pattern"):
        parse_layer_pattern(pattern)


def test_a_run_folder_that_can_be_made_passes_and_is_not_made(tmp_path):
    check_run_dir(tmp_path / "a" / "b", needed_bytes=1)
    assert not (tmp_path / "a").exists()


def test_a_run_folder_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run.*change run_dir"):
        check_run_dir(tmp_path / "file" / "run", needed_bytes=1)


def test_a_full_disk_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"GiB free but one checkpoint needs 1048576\.0 GiB; change run_dir"):
        check_run_dir(tmp_path, needed_bytes=2**50)


@pytest.mark.parametrize(
    ("length", "expected"), [(2048, 1000), (2**15, 1000), (2**16, 512), (2**20, 32), (2**25, 1), (2**26, 1)]
)
def test_long_sequences_are_validated_up_to_the_most_tokens(length, expected):
    assert (
        validated_sequences(changed(legal(), {"data.sequence_length_tokens": length, "validation.sequences": 1000}))
        == expected
    )
