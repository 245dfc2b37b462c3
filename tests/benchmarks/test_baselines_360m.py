"""The table of 360M baselines: settings of its jobs, rows out of run folders, and lines of Markdown."""

from pathlib import Path

import pytest

from based_megatron.config.command_line import parse_config
from based_megatron.config.validate import validate
from based_megatron.monitor.events import append_event
from based_megatron.run_folder.files import EVENTS
from benchmarks.baselines_360m import PRESETS, RECOMPUTED, arguments_of, row_of, to_markdown


@pytest.mark.parametrize("preset", PRESETS)
def test_a_job_takes_the_steps_and_sequences_that_are_asked_for(preset):
    command, *words = arguments_of(preset, "corpus", Path("runs/x"), steps=7, sequences=4)
    config = parse_config(words)
    validate(config, 1)
    assert (command, config.train.steps) == ("train", 7)
    assert config.train.micro_batch_sequences == config.train.global_batch_sequences == 4
    assert (config.train.recompute == "mixer") == (preset in RECOMPUTED)
    assert (config.checkpoint.interval_steps, config.validation.interval_steps) == (0, 0)


def events_of(folder: Path) -> None:
    """Sixty steps, logged every ten: the first line is slow."""
    append_event(folder / EVENTS, {"event": "start", "step": 0, "parameters": 360_000_000})
    for last in range(10, 61, 10):
        losses = [9.0 - 0.01 * step for step in range(last - 9, last + 1)]
        append_event(folder / EVENTS, {"event": "steps", "step": last, "loss": losses, "grad_norm": [1.0] * 10})
        rate = 1e3 if last == 10 else 1e5 + last
        line = {"event": "step", "step": last, "loss": 0.0, "tokens_per_second": rate, "memory/peak_gib": 40.0}
        append_event(folder / EVENTS, line)


def test_a_row_has_medians_after_the_first_line_and_losses_of_single_steps(tmp_path):
    events_of(tmp_path)
    row = row_of("rwkv-360m", tmp_path, sequences=16)
    assert (row["tokens_per_second"], row["peak_gib"], row["steps"]) == (100_040, 40.0, 60)
    assert row["losses"] == {1: 8.99, 50: 8.5}
    assert (row["parameters"], row["recompute"], row["sequences"]) == (360_000_000, "mixer", 16)


def test_the_table_has_a_line_for_each_and_gaps_where_a_run_ended_early():
    done = {"preset": "a", "parameters": 3.6e8, "tokens_per_second": 123456.7, "peak_gib": 40.04}
    rows = [
        {**done, "losses": {1: 11.0, 50: 7.25}},
        {**done, "preset": "b", "losses": {"1": 10.9}},
        {"preset": "c", "failed": "the job ended with status 3"},
    ]
    header, _, *lines = to_markdown(rows).splitlines()
    assert header == "| model | parameters | tokens/s | peak GiB | loss at 1 | loss at 50 |"
    assert lines[0] == "| a | 360 M | 123,457 | 40.0 | 11.000 | 7.250 |"
    assert lines[1].endswith("| 10.900 |  |")
    assert lines[2].startswith("| c | the job ended with status 3 |")
    assert {line.count("|") for line in (header, *lines)} == {7}
