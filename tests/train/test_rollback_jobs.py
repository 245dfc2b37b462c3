"""Jobs whose steps go wrong: spikes are skipped, ruined weights are undone, and what was killed resumes to the same curve."""

import shutil
from pathlib import Path

import pytest

from based_megatron.checkpoint.store import list_checkpoints
from support.faults import PARAMETER, Faults, train_with_faults
from support.pool import RankFailure
from support.runs import events, losses

LAST = 17
GUARDED = (
    "--guards.window-steps", "8", "--guards.warmup-steps", "8", "--train.max-skipped-steps", "3", "--train.steps", str(LAST),
    "--validation.interval-steps", "0", "--checkpoint.interval-steps", "5", "--schedule.warmup-steps", "5",
)  # fmt: skip
LAYOUTS = {
    "single": (1, ()),
    "zero1-bf16": (2, ("--train.precision", "bf16")),
    "zero2": (2, ("--parallel.zero-stage", "2")),
    "zero3": (2, ("--parallel.zero-stage", "3")),
    "pp2-tp2": (4, ("--parallel.pipeline", "2", "--parallel.tensor", "2")),
    "cp2-carried": (2, ("--parallel.context", "2", "--data.carry-state", "--model.layer-pattern", "cLSc")),
}


def train(worker_pool, layout: str, run_dir: Path, corpus: Path, faults: Faults, *overrides: str) -> list[bool]:
    size, of_layout = LAYOUTS[layout]
    return worker_pool(size).run(train_with_faults, run_dir, corpus, faults, *GUARDED, *of_layout, *overrides)


@pytest.mark.parametrize(
    "layout", [name if name in ("single", "zero3") else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_bad_steps_are_skipped_and_ruined_weights_undone(worker_pool, corpus, tmp_path, layout):
    """The gradient of step 9 is a spike. An absurd rate in step 12 ruins the weights: the run goes on from the checkpoint of step 10."""
    faults = Faults(gradients={9: 1e4}, rates={12: 1e3})
    assert all(train(worker_pool, layout, tmp_path / "run", corpus, faults))
    first, *others = events(tmp_path / "run", "skip")
    assert (first["step"], first["reason"], first["parameters"][0]) == (9, "the gradient norm is a spike", PARAMETER)
    assert 4 < first["grad_norm"] < 1e9, "it is finite: without a guard the step would count"
    assert first["documents"] and first["look"].endswith("--data-step 9")
    assert [event["step"] for event in others] == [13, 14, 15]
    (rollback,) = events(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["to_step"], rollback["data_jumps"]) == (15, 10, [[10, 15]])
    curve = losses(tmp_path / "run")
    assert sorted(curve) == list(range(1, LAST + 1)) and max(curve[step] for step in range(11, LAST + 1)) < curve[1]
    # One that was killed after its next checkpoint goes on to the same curve, with the same data.
    name = "checkpoints/step-00000015"
    shutil.copytree(tmp_path / "run" / name, tmp_path / "resumed" / name)
    train(worker_pool, layout, tmp_path / "resumed", corpus, Faults())
    assert losses(tmp_path / "resumed") == {step: curve[step] for step in range(16, LAST + 1)}


def test_a_checkpoint_of_ruined_weights_is_moved_out_of_the_way(worker_pool, corpus, tmp_path):
    """Step 15 ruins them and is saved. The first return finds that out, the second goes further back."""
    train(worker_pool, "single", tmp_path, corpus, Faults(rates={15: 1e3}), "--train.steps", "19")
    assert [event["to_step"] for event in events(tmp_path, "rollback")] == [15, 10]
    assert events(tmp_path, "rollback")[-1]["data_jumps"] == [[10, 21]]
    assert [path.name for path in (tmp_path / "rolled-back").iterdir()] == ["step-00000015"]
    assert [path.name[-2:] for path in list_checkpoints(tmp_path / "checkpoints")] == ["19", "15", "10", "05"]
    curve = losses(tmp_path)
    assert max(curve[step] for step in range(11, 20)) < curve[1]


def test_a_run_that_was_killed_before_a_spike_skips_it_too(worker_pool, corpus, tmp_path):
    """The window of the checkpoint decides as that of the run did."""
    train(worker_pool, "single", tmp_path / "whole", corpus, Faults(gradients={16: 1e4}))
    name = "checkpoints/step-00000015"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "resumed" / name)
    train(worker_pool, "single", tmp_path / "resumed", corpus, Faults(gradients={1: 1e4}))
    assert [event["step"] for event in events(tmp_path / "resumed", "skip")] == [16]
    curve = losses(tmp_path / "whole")
    assert losses(tmp_path / "resumed") == {step: curve[step] for step in (16, 17)}


def test_a_run_that_ends_on_skipped_steps_is_no_success(worker_pool, corpus, tmp_path):
    """It fails in one line, is not done, and fails again at once when it is started again; its weights are saved."""
    for _ in range(2):
        with pytest.raises(RankFailure, match=r"the last 2 of 17 steps were skipped: the weights are those of step 15"):
            train(worker_pool, "single", tmp_path, corpus, Faults(gradients={16: 1e4, 17: 1e4}))
    (first, second) = events(tmp_path, "error")
    assert first["message"] == second["message"] and "\n" not in first["message"]
    assert events(tmp_path, "end") == []
    assert [path.name[-2:] for path in list_checkpoints(tmp_path / "checkpoints")][:2] == ["17", "15"]


def test_a_run_whose_steps_were_all_skipped_is_no_success(worker_pool, corpus, tmp_path):
    nans = Faults(gradients={step: float("nan") for step in (1, 2)})
    with pytest.raises(RankFailure, match=r"all 2 steps were skipped"):
        train(worker_pool, "single", tmp_path, corpus, nans, "--train.steps", "2")
