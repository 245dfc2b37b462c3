"""One check for all numbers and texts: each outside its limits is refused in one line that names it, its value and what is legal."""

import math
from typing import Any

import pytest
from config_changes import changed, legal

from based_megatron.config import Config, SourceConfig, load_config, preset_names
from based_megatron.config.limits import Range, absolute_paths, check_limits, settings_of
from based_megatron.errors import ConfigError

NUMBERS = {
    setting.key: setting.value
    for setting in settings_of(Config())
    if isinstance(setting.value, (int, float)) and not isinstance(setting.value, bool)
}
SECTIONS_WITH_ZERO = {
    "model": "prefix_tokens window_left",
    "data": "num_workers seed",
    "parallel": "zero_stage",
    "optimizer": "beta1 beta2 weight_decay clip_grad_norm muon.momentum",
    "schedule": "warmup_steps warmup_lr decay_steps min_lr",
    "train": "prefix_mask_fraction prefix_mask_token seed",
    "guards": "replica_check_interval_steps",
    "validation": "recall_probe_sequences recall_rare_count interval_steps sequences",
    "checkpoint": "interval_steps interval_seconds keep_last keep_every_steps",
    "monitor": "hang_seconds peak_flops sample_interval_steps",
}
MAY_BE_ZERO = {f"{section}.{name}" for section, names in SECTIONS_WITH_ZERO.items() for name in names.split()}


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        check_limits(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def accepts(key: str, value: Any) -> bool:
    try:
        check_limits(changed(legal(), {key: value}))
    except ConfigError as error:
        assert str(error).startswith(f"{key} is ") and str(error).endswith(f"; change {key}")
        return False
    return True


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_is_negative_absurd_or_not_finite(key):
    wrong = (
        [-1, -(10**30), 10**30, 1 << 40_000] if isinstance(NUMBERS[key], int) else [-1e-9, -math.inf, math.inf, 1e39]
    )
    for value in wrong if isinstance(NUMBERS[key], int) else [*wrong, math.nan]:
        assert not accepts(key, value), value


@pytest.mark.parametrize("key", NUMBERS)
def test_zero_is_refused_where_nothing_can_be_done_with_it(key):
    assert NUMBERS.keys() >= MAY_BE_ZERO
    assert accepts(key, type(NUMBERS[key])(0)) == (key in MAY_BE_ZERO)


@pytest.mark.parametrize("preset", preset_names())
def test_presets_and_defaults_are_within_their_limits(preset):
    check_limits(load_config(preset))
    check_limits(Config())


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("optimizer.lr", math.nan, "optimizer.lr is nan, but must be a finite number above 0; change optimizer.lr"),
        ("train.steps", 0, "train.steps is 0, but must be a whole number at least 1; change train.steps"),
        (
            "optimizer.beta1",
            1.0,
            "optimizer.beta1 is 1.0, but must be a finite number at least 0 and below 1; change optimizer.beta1",
        ),
        (
            "data.seed",
            1 << 64,
            "data.seed is an integer of 65 bits, but must be a whole number of 64 bits at least 0; change data.seed",
        ),
        (
            "model.conv_expand",
            3,
            "model.conv_expand is 3, but must be a whole number at least 2 and a multiple of 2; change model.conv_expand",
        ),
    ],
)
def test_the_line_says_what_is_legal(key, value, line):
    assert refusal(changed(legal(), {key: value})) == line


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (Range(at_least=1), [1, 2], [0.999, math.nan]),
        (Range(above=0), [1e-30], [0, -1]),
        (Range(at_most=3), [3, -9], [3.001]),
        (Range(below=1), [0.999], [1]),
        (Range(multiple_of=2), [0, 4], [3]),
        (Range(at_least=0, below=1), [0, 0.5], [-0.1, 1]),
    ],
    ids=str,
)
def test_a_range_holds_what_is_inside(bounds, inside, outside):
    assert all(map(bounds.holds, inside)) and not any(map(bounds.holds, outside))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("run_dir", "", "is empty"),
        ("run_dir", "a\nb", "cannot be printed"),
        ("run_dir", "a\0b", "not text"),
        ("data.path", "\ud800", "not text"),
        ("monitor.sample_prompts", ("fine", "\ud800"), "not text"),
        ("checkpoint.load", "a\tb", "cannot be printed"),
    ],
)
def test_texts_that_are_none_are_refused(key, value, words):
    line = refusal(changed(legal(), {key: value}))
    assert key in line and words in line


def test_a_prompt_may_have_lines():
    check_limits(changed(legal(), {"monitor.sample_prompts": ("def f():\n",)}))


def test_sources_are_checked_too():
    config = changed(legal(), {"data.path": "", "data.sources": (SourceConfig("a"), SourceConfig("b", math.nan))})
    assert refusal(config).startswith("data.sources.1.weight is nan")


def test_every_path_becomes_absolute_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {
        "run_dir": "run",
        "checkpoint.load": "../old",
        "data.sources": (SourceConfig("a/./b", 2.0),),
        "data.path": "",
    }
    config = changed(load_config("tiny"), changes)
    expected = {
        "run_dir": f"{tmp_path}/run",
        "checkpoint.load": f"{tmp_path.parent}/old",
        "data.sources": (SourceConfig(f"{tmp_path}/a/b", 2.0),),
    }
    assert absolute_paths(config) == changed(config, expected)
    assert absolute_paths(absolute_paths(config)) == absolute_paths(config)
