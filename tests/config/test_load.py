"""Presets, YAML files, overrides: strict, with a suggestion, and the same after a round trip."""

import dataclasses
import re
from typing import Any

import pytest
import yaml
from config_changes import changed

from based_megatron.config import (
    Config,
    SourceConfig,
    from_dict,
    load_config,
    parse_config,
    preset_names,
    save_config,
    to_dict,
)
from based_megatron.errors import ConfigError


def field_keys(config: Any = Config()) -> list[str]:  # noqa: B008
    """Every `section.field` of a Config, `run_dir` included."""
    keys = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = [f".{key}" for key in field_keys(value)] if dataclasses.is_dataclass(value) else [""]
        keys += [field.name + suffix for suffix in inner]
    return keys


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_a_round_trip(name):
    config = load_config(name)
    assert from_dict(to_dict(config)) == config


def test_sources_and_prompts_survive_a_round_trip_through_yaml(tmp_path):
    sources = (SourceConfig("wiki", 2.5), SourceConfig("code"))
    values = {"data.sources": sources, "monitor.sample_prompts": ("a b", "ü"), "optimizer.lr": 1e-7}
    config = changed(load_config("based-1b"), values)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_the_saved_form_is_plain():
    """Checkpoints hold it: only dicts, lists, strings and numbers."""
    values = to_dict(changed(load_config("tiny"), {"data.sources": (SourceConfig("a"),)}))
    assert values["data"]["sources"] == [{"path": "a", "weight": 1.0, "max_epochs": 0.0}]
    assert yaml.safe_load(yaml.safe_dump(values)) == values


def test_missing_keys_take_their_defaults():
    assert from_dict({}) == Config()
    assert from_dict({"data": {"allow_changed": True}}) == Config(), "a setting that earlier versions have saved"
    assert from_dict({"optimizer": {"lr": 1e-3}}) == changed(Config(), {"optimizer.lr": 1e-3})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"optimiser": {}}, ["'optimiser'", "Did you mean: 'optimizer'?"]),
        ({"optimizer": {"learning_rat": 1}}, ["optimizer.learning_rat"]),
        ({"train": {"presicion": 1}}, ["train.presicion", "Did you mean: 'precision'?"]),
        ({"data": {"sources": [{"pth": "a"}]}}, ["'pth'", "Did you mean: 'path'?"]),
        ({"data": {"sources": "a"}}, ["data.sources", "'a'"]),
        ({"data": {"sources": {"path": "a"}}}, ["data.sources", "'path'"]),
        ({"data": {"sources": ["a"]}}, ["data.sources", "['a']"]),
        ({"data": "corpus"}, ["DataConfig", "corpus"]),
        ({"data": None}, ["'data'"]),
        ({"model": 5}, ["ModelConfig", "5"]),
        ({"optimizer": {"lr": "fast"}}, ["optimizer.lr", "'fast'"]),
        ({"train": {"steps": 1.5}}, ["train.steps", "1.5"]),
        ({"train": {"precision": "fp16"}}, ["train.precision", "'fp16'", "'bf16'"]),
        ({"run_dir": None}, ["run_dir"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(values, expected):
    with pytest.raises(ConfigError) as error:
        from_dict(values, where="my.yaml")
    line = str(error.value)
    assert line.startswith("my.yaml: ") and "\n" not in line
    for text in expected:
        assert text in line


def test_extends_keeps_what_it_does_not_name(tmp_path):
    path = write(tmp_path / "mine.yaml", "extends: based-1b-50b\nmodel:\n  window_left: 64\n")
    assert load_config(path) == changed(load_config("based-1b-50b"), {"model.window_left": 64})


def test_extends_another_file(tmp_path):
    first = write(tmp_path / "first.yaml", "extends: tiny\noptimizer:\n  lr: 0.25\n  beta1: 0.5\n")
    second = write(tmp_path / "second.yaml", f"extends: {first}\noptimizer:\n  lr: 0.125\n")
    assert load_config(second) == changed(load_config("tiny"), {"optimizer.lr": 0.125, "optimizer.beta1": 0.5})


def test_an_unknown_key_under_extends_names_the_file(tmp_path):
    path = write(tmp_path / "mine.yaml", "extends: tiny\nmodel:\n  window: 64\n")
    with pytest.raises(ConfigError, match=re.escape(path) + r".*'window'.*model\.window"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("- a\n- b\n", "holds a list"), ("model: [", "is not YAML"), ("extends: based-2t\n", "'based-2t'.*based-1b")],
)
def test_files_that_are_no_config(tmp_path, text, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        load_config(write(tmp_path / "bad.yaml", text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["based-2t", "nowhere/mine.yaml"])
def test_an_unknown_config_lists_the_presets(name):
    with pytest.raises(ConfigError) as error:
        load_config(name)
    assert name in str(error.value) and all(preset in str(error.value) for preset in preset_names())


@pytest.mark.parametrize("config", [["--config", "tiny"], ["--config=tiny"]])
def test_overrides_on_the_command_line(config):
    argv = ["--optimizer.lr", "1e-3", *config, "--parallel.tensor=2", "--data.no-isolate-documents"]
    argv += ["--monitor.sample-prompts", "a b", "c", "--run-dir", "here", "--train.precision", "bf16"]
    expected = changed(
        load_config("tiny"),
        {
            "optimizer.lr": 1e-3,
            "parallel.tensor": 2,
            "data.isolate_documents": False,
            "monitor.sample_prompts": ("a b", "c"),
            "train.precision": "bf16",
        },
    )
    assert parse_config(argv) == dataclasses.replace(expected, run_dir="here")


def test_sources_of_a_file_stay_under_overrides(tmp_path):
    path = write(tmp_path / "mix.yaml", "data:\n  sources:\n  - {path: a, weight: 2}\n  - {path: b}\n")
    config = parse_config(["--config", path, "--data.seed", "7"])
    assert config.data.sources == (SourceConfig("a", 2.0), SourceConfig("b")) and config.data.seed == 7


def test_sources_and_their_schedule_are_words_on_the_command_line(tmp_path):
    words = ["--data.sources", "c/a=0.123456789", "b=2:1.5", "d", "--data.schedule", "3B=1,2,0", "4B=1,0,0"]
    data = parse_config(["--config", "tiny", *words]).data
    assert data.sources == (SourceConfig("c/a", 0.123456789), SourceConfig("b", 2, 1.5), SourceConfig("d"))
    assert data.schedule == ("3B=1,2,0", "4B=1,0,0")


@pytest.mark.parametrize("argv", [[], ["--train.steps", "3"], ["--config"], ["--config="]])
def test_a_config_must_be_named(argv):
    with pytest.raises(ConfigError, match=r"add --config .*based-360m"):
        parse_config(argv)


@pytest.mark.parametrize(
    ("override", "expected"), [(["--optimizer.lrr", "1"], "--optimizer.lr"), (["--train.steps", "many"], "many")]
)
def test_a_wrong_override_is_refused(capsys, override, expected):
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--config", "tiny", *override])
    assert stopped.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["--config", "tiny", "-h"]])
def test_help_lists_every_field(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        parse_config(argv)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    flags = set(re.findall(r"--([a-z0-9.-]+)", shown))
    assert {*(key.replace("_", "-") for key in field_keys()), "config", "print-config", "dry-run"} <= flags
    assert "Peak learning rate. (default:" in shown


def test_help_shows_the_defaults_of_the_chosen_preset(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--config", "based-1b", "--help"])
    assert "Width of the residual stream. (default: 1792)" in capsys.readouterr().out
