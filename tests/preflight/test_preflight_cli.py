"""The page of `based preflight`, its refusals, its proposals, and predictions against what was measured."""

import dataclasses
import json
import math
from typing import Any

import pytest

from based_megatron.cli import main
from based_megatron.config import Config, load_config
from based_megatron.config.validate import validate
from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.prepare import prepare
from based_megatron.kernels.taylor_attention import sizes
from based_megatron.monitor.flops import parameter_count
from based_megatron.preflight.checks import kept_bytes, with_data
from based_megatron.preflight.gpus import GIB, gpu_named
from based_megatron.preflight.layouts import fits, propose
from based_megatron.preflight.memory import rank_memory, worst_rank
from based_megatron.preflight.shapes import local_parameters
from based_megatron.preflight.time import run_time, steps_between_saves

H100 = gpu_named("h100")


def preset(name: str, parallel: dict | None = None, **train) -> Config:
    """A preset with some keys of its layout and training changed."""
    config = with_data(load_config(name))
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, **(parallel or {})),
        train=dataclasses.replace(config.train, **train),
    )


@pytest.mark.parametrize("name", ["based-360m", "based-1b", "transformer-1b"])
def test_one_rank_holds_every_parameter(name):
    config = load_config(name)
    assert sum(parameter.numel for parameter in local_parameters(config, 0)) == parameter_count(config.model)


def test_sizes_of_saved_states_are_those_of_the_kernels_schedule():
    triton_attention = pytest.importorskip("based_megatron.kernels.taylor_attention.triton_attention")
    schedule = triton_attention.Schedule()
    here = (sizes.CHUNK_TOKENS, sizes.TILE_ROWS, sizes.SCAN_ROWS, sizes.PROGRAMS_WANTED)
    assert here == (schedule.chunk_tokens, schedule.tile_rows, schedule.scan_rows, schedule.programs_wanted)


def test_recomputing_more_keeps_less_and_a_larger_micro_batch_more():
    kept = [rank_memory(preset("based-1b", recompute=mode), 1, 0).activations for mode in ("none", "mixer", "full")]
    assert kept == sorted(kept, reverse=True)
    one, two = (
        rank_memory(preset("based-1b", micro_batch_sequences=n, global_batch_sequences=8), 1, 0) for n in (4, 8)
    )
    assert two.activations > 1.9 * one.activations and two.weights == one.weights


def test_memory_of_a_forward_and_backward_pass_is_near_what_was_measured():
    """`based bench train` (benchmarks/results/h200-train.md): 39 GiB with bf16 weights and gradients only."""
    memory = rank_memory(preset("based-1b", micro_batch_sequences=8, global_batch_sequences=8), 1, 0)
    assert (memory.weights + memory.activations + memory.logits) / GIB == pytest.approx(39, rel=0.05)


@pytest.mark.parametrize(
    ("parallel", "train", "gpus", "tokens_per_second"),
    [
        ({}, dict(micro_batch_sequences=8, global_batch_sequences=32), 1, 60_600),
        ({}, dict(micro_batch_sequences=8, global_batch_sequences=64), 2, 120_100),
        ({}, dict(micro_batch_sequences=8, global_batch_sequences=16), 2, 107_500),
        ({"tensor": 2}, dict(micro_batch_sequences=8, global_batch_sequences=32), 2, 77_500),
        ({"pipeline": 2}, dict(micro_batch_sequences=4, global_batch_sequences=32), 2, 98_900),
        ({"zero_stage": 2}, dict(micro_batch_sequences=8, global_batch_sequences=16), 2, 100_400),
        ({"zero_stage": 3}, dict(micro_batch_sequences=8, global_batch_sequences=16), 2, 84_400),
    ],
)
def test_predicted_rates_are_near_those_measured_on_an_h100(parallel, train, gpus, tokens_per_second):
    predicted = run_time(preset("based-1b", parallel, **train), 1, gpus, H100).tokens_per_second
    assert predicted == pytest.approx(tokens_per_second, rel=0.12)


def test_hours_count_all_tokens_saves_and_gpus():
    config = preset("based-1b", micro_batch_sequences=8)
    time = run_time(config, 1, 8, H100)
    assert time.tokens == config.train.steps * 256 * 2048
    assert time.save_bytes == 12 * parameter_count(config.model)
    assert time.save_wait_seconds == 0, "saves are written while training goes on"
    assert time.total_seconds > config.train.steps * time.step_seconds + time.save_seconds
    assert time.gpu_hours == pytest.approx(8 * time.total_seconds / 3600)


def with_saves(**changes: Any) -> Config:
    config = preset("based-1b", micro_batch_sequences=8)
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, **changes))


def test_training_waits_for_saves_that_are_synchronous_or_come_too_fast():
    hidden, waited = (run_time(with_saves(asynchronous=flag), 1, 8, H100) for flag in (True, False))
    assert waited.save_wait_seconds == waited.save_seconds == hidden.save_seconds
    assert waited.total_seconds == pytest.approx(hidden.total_seconds + 20 * waited.save_seconds)
    fast = run_time(with_saves(interval_steps=1), 1, 8, H100)
    assert fast.save_wait_seconds == pytest.approx(fast.save_seconds - fast.step_seconds)


def test_saves_by_time_count_as_the_steps_between_them():
    step_seconds = 2.0
    assert steps_between_saves(with_saves(interval_steps=0), step_seconds) == math.inf
    assert steps_between_saves(with_saves(interval_steps=0, interval_seconds=100), step_seconds) == 50
    assert steps_between_saves(with_saves(interval_steps=20, interval_seconds=100), step_seconds) == 20
    assert steps_between_saves(with_saves(interval_steps=0, interval_seconds=1), step_seconds) == 1


@pytest.mark.parametrize(
    ("changes", "checkpoints"),
    [
        ({"keep_last": 3}, 4),
        ({"keep_last": 0}, 21),
        ({"keep_last": 3, "keep_every_steps": 10_000}, 6),
        ({"keep_last": 30, "keep_every_steps": 1000}, 21),
        ({"keep_last": 30, "interval_steps": 0, "interval_seconds": 600.0}, 33),
        ({"keep_last": 1}, 4),
    ],
)
def test_the_disk_holds_what_is_kept_and_the_one_being_written(changes, checkpoints):
    """A run of 20,000 steps saves at every 1,000 and at the end."""
    assert kept_bytes(with_saves(**changes), save_bytes=7) == 7 * checkpoints


def test_proposals_run_and_fit_where_the_config_does_not():
    config = with_data(load_config("based-1b"))
    proposed = propose(config, 64, 8, H100)
    assert len(proposed) == 4
    for layout in proposed:
        validate(layout.config, 512)
        assert fits(layout.memory, H100) and layout.memory == worst_rank(layout.config, 512)
        assert layout.changes
    assert all(layout.config.train.global_batch_sequences == 256 for layout in proposed[:3])
    assert proposed[3].config.train.global_batch_sequences > 256


def test_page_says_all_refusals_and_what_to_change(capsys):
    assert main(["preflight", "based-1b", "--nodes", "64", "--data.path", "missing"]) == 1
    page = capsys.readouterr().out
    assert "train.global_batch_sequences 256 is not a multiple" in page and "no manifest.json at missing" in page
    assert "layouts that run and fit" in page and "#SBATCH" not in page


def test_page_of_a_run_that_can_start_ends_with_the_batch_script(capsys, tmp_path):
    lines = [json.dumps({"text": f"document {i}: " + " ".join(f"{j * i % 97}" for j in range(90))}) for i in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    inputs, data = (str(tmp_path / "text.jsonl"),), tmp_path / "data"
    prepare(PrepConfig(inputs=inputs, output=str(data), vocab_size=300, validation_fraction=0.1))
    arguments = [
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--data.path",
        str(data),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    found = main(["preflight", "tiny", *arguments, "--train.micro-batch-sequences", "2"])
    page = capsys.readouterr().out
    assert found == 0, page
    assert "fits" in page and "tokens/s" in page and "GPU hours" in page and "assumed" in page
    assert "#SBATCH --nodes=2" in page and "train --config tiny" in page
    assert not (tmp_path / "run").exists()


def test_unknown_gpus_and_counts_are_refused(capsys):
    assert main(["preflight", "based-1b", "--gpu", "abacus"]) == 2
    assert "--gpu abacus" in capsys.readouterr().err
    assert main(["preflight", "based-1b", "--nodes", "0"]) == 2
    assert "--nodes is 0" in capsys.readouterr().err
