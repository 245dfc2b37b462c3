"""Which settings a run keeps: every field of the schema has chosen, and a change of what is fixed is found and named."""

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from config_changes import changed, legal

from based_megatron.config import Config, to_dict
from based_megatron.config.changes import (
    Resume,
    changed_settings,
    check_allowed,
    describe_changes,
    is_allowed,
    refused_changes,
    resume_marks,
)
from based_megatron.config.limits import settings_of
from based_megatron.errors import ConfigError

MARKS = resume_marks(Config)


def test_every_setting_says_whether_it_may_change_when_a_run_goes_on():
    assert [key for key, mark in MARKS.items() if mark is None] == []
    assert MARKS.keys() == {setting.key for setting in settings_of(Config())}


@pytest.mark.parametrize(
    "key",
    [
        "model.rotary_base",
        "model.norm_eps",
        "model.layer_pattern",
        "model.window_left",
        "optimizer.name",
        "optimizer.lr",
        "optimizer.beta2",
        "optimizer.eps",
        "optimizer.weight_decay_mode",
        "optimizer.muon.momentum",
        "schedule.decay_steps",
        "schedule.min_lr",
        "train.steps",
        "train.seed",
        "train.precision",
        "train.fp8_layers",
        "train.global_batch_sequences",
        "data.seed",
        "data.isolate_documents",
        "data.carry_state",
        "data.cross_blocks",
        "data.sequence_length_tokens",
    ],
)
def test_what_a_run_is_stays(key):
    assert MARKS[key] is Resume.FIXED


@pytest.mark.parametrize(
    "key",
    [
        "run_dir",
        "run_name",
        "parallel.tensor",
        "parallel.zero_stage",
        "train.micro_batch_sequences",
        "train.recompute",
        "train.device",
        "train.max_skipped_steps",
        "optimizer.implementation",
        "data.path",
        "data.num_workers",
        "checkpoint.interval_steps",
        "checkpoint.load",
        "monitor.trackers",
        "validation.interval_steps",
    ],
)
def test_where_and_how_it_runs_may_change(key):
    assert MARKS[key] is Resume.FREE


def changes_to(values: dict[str, Any]) -> dict[str, list[Any]]:
    return changed_settings(Config, to_dict(legal()), to_dict(changed(legal(), values)))


def test_changed_settings_are_found_with_both_values():
    found = changes_to({"optimizer.lr": 0.5, "optimizer.muon.momentum": 0.5, "parallel.tensor": 2})
    assert found == {
        "optimizer.lr": [legal().optimizer.lr, 0.5],
        "optimizer.muon.momentum": [0.95, 0.5],
        "parallel.tensor": [1, 2],
    }
    assert describe_changes({"a.b": [1, "x"], "c": ["y" * 99, None]}) == f"a.b 1 -> 'x', c '{'y' * 56}... -> None"


def test_what_only_one_version_has_is_no_change():
    then, now = to_dict(legal()), to_dict(legal())
    del then["optimizer"], then["model"]["norm_eps"]
    now["model"]["unknown"] = 1
    assert changed_settings(Config, then, now) == {}


@pytest.mark.parametrize(
    ("allowed", "left"),
    [
        ((), ["optimizer.lr", "train.seed"]),
        (("optimizer.lr",), ["train.seed"]),
        (("optimizer",), ["train.seed"]),
        (("train", "optimizer"), []),
        (("optimizer.l", "optim"), ["optimizer.lr", "train.seed"]),
    ],
)
def test_fixed_changes_are_refused_unless_they_or_their_section_are_named(allowed, left):
    changes = {"optimizer.lr": [1, 2], "parallel.tensor": [1, 2], "train.seed": [1, 2]}
    assert list(refused_changes(Config, changes, allowed)) == left


def test_a_field_that_has_not_chosen_is_taken_for_fixed():
    @dataclass(frozen=True)
    class Forgetful:
        x: int = 1
        y: Annotated[int, Resume.FREE] = 1

    assert resume_marks(Forgetful) == {"x": None, "y": Resume.FREE}
    assert refused_changes(Forgetful, {"x": [1, 2], "y": [1, 2]}, ()) == {"x": [1, 2]}


def test_names_that_mean_nothing_are_refused_with_a_suggestion():
    check_allowed(Config, ["optimizer", "optimizer.muon", "optimizer.muon.momentum", "run_dir"])
    with pytest.raises(
        ConfigError, match=r"'optimizer\.rl'.*did you mean optimizer\.lr\?.*change checkpoint\.allow_changed"
    ):
        check_allowed(Config, ["optimizer.rl"])
    with pytest.raises(ConfigError, match="''"):
        check_allowed(Config, [""])
    assert not is_allowed("data.path", [""])
