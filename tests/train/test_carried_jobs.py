"""With carried states, a run that resumes does what an undisturbed one does, in its own layout bit for bit, in others to rounding."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.prepare import prepare
from support.faults import Faults, train_with_faults
from support.runs import events, kill_when, losses, start_job, train_in_pool

MIDDLE, LAST = 4, 6
CARRY = (
    "--data.carry-state", "--model.layer-pattern", "cLSLc", "--train.steps", str(LAST), "--validation.interval-steps", "0",
    "--checkpoint.interval-steps", str(MIDDLE),
)  # fmt: skip
LAYOUTS = {
    "single": (1, ()),
    "single, larger micro batches": (1, ("--train.micro-batch-sequences", "4")),
    "cp2": (2, ("--parallel.context", "2")),
    "tp2-bf16": (2, ("--parallel.tensor", "2", "--train.precision", "bf16")),
    "tp2-cp2": (4, ("--parallel.tensor", "2", "--parallel.context", "2")),
    "pp2-interleaved-dp2": (4, ("--parallel.pipeline", "2", "--parallel.virtual-pipeline", "2")),
    "cp2-dp2-zero3": (4, ("--parallel.context", "2", "--parallel.zero-stage", "3")),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Documents of one to some ten sequences of 64 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [
        json.dumps({"text": f"document {i}: " + " ".join(f"{j * i % 97}" for j in range(20 + 40 * (i % 7)))})
        for i in range(80)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines))
    output = folder / "data"
    prepare(
        PrepConfig(inputs=(str(folder / "text.jsonl"),), output=str(output), vocab_size=300, validation_fraction=0.1)
    )
    return output


@pytest.fixture(scope="module")
def uninterrupted(worker_pool, corpus, tmp_path_factory):
    """uninterrupted(layout) is the run folder of a job that nobody disturbed."""
    folders: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp("run")
            size, overrides = LAYOUTS[layout]
            worker_pool(size).run(train_in_pool, folders[layout], corpus, *CARRY, *overrides)
        return folders[layout]

    return get


def resume(
    worker_pool, source: Path, run_dir: Path, corpus: Path, layout: str, *overrides: str
) -> tuple[dict[int, float], dict[int, float]]:
    """Losses of a job that finds the checkpoint in the middle of another one, and what the other one had."""
    name, (size, of_layout) = f"checkpoints/step-{MIDDLE:08d}", LAYOUTS[layout]
    shutil.copytree(source / name, run_dir / name)
    worker_pool(size).run(train_in_pool, run_dir, corpus, *CARRY, *of_layout, *overrides)
    found, expected = losses(run_dir), losses(source)
    assert sorted(found) == list(range(MIDDLE + 1, LAST + 1)) and sorted(expected) == list(range(1, LAST + 1))
    assert events(run_dir, "warning") == []
    return found, {step: expected[step] for step in found}


@pytest.mark.parametrize("layout", ["single", "cp2", "tp2-bf16"])
def test_the_same_layout_resumes_bit_for_bit(worker_pool, uninterrupted, corpus, tmp_path, layout):
    """Although it validates and samples after each step: passes without gradients leave carried states alone."""
    beside = (
        "--validation.interval-steps",
        "1",
        "--monitor.sample-interval-steps",
        "1",
        "--monitor.sample-tokens",
        "2",
    )
    found, expected = resume(worker_pool, uninterrupted(layout), tmp_path, corpus, layout, *beside)
    assert found == expected
    assert len(events(tmp_path, "validation")) == len(found)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("single", "cp2-dp2-zero3"),
        ("single", "pp2-interleaved-dp2"),
        ("tp2-cp2", "single"),
        ("pp2-interleaved-dp2", "single, larger micro batches"),
    ],
)
def test_another_layout_resumes(worker_pool, uninterrupted, corpus, tmp_path, writer, reader):
    found, expected = resume(worker_pool, uninterrupted(writer), tmp_path, corpus, reader)
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-5)


@pytest.mark.parametrize("layout", ["single", "cp2", "tp2-bf16", "pp2-interleaved-dp2"])
def test_a_nan_in_one_step_is_gone_in_the_next(worker_pool, corpus, tmp_path, layout):
    """Carried states stay as they were before the step; a run that resumes after it goes on bit for bit."""
    size, overrides = LAYOUTS[layout]
    job = (corpus, Faults(outputs={MIDDLE - 1: math.nan}), *CARRY, *overrides)
    worker_pool(size).run(train_with_faults, tmp_path / "disturbed", *job)
    assert [event["step"] for event in events(tmp_path / "disturbed", "skip")] == [MIDDLE - 1]
    expected = losses(tmp_path / "disturbed")
    assert [step for step, loss in expected.items() if not math.isfinite(float(loss))] == [MIDDLE - 1]
    name = f"checkpoints/step-{MIDDLE:08d}"
    shutil.copytree(tmp_path / "disturbed" / name, tmp_path / "resumed" / name)
    worker_pool(size).run(train_in_pool, tmp_path / "resumed", corpus, *CARRY, *overrides)
    assert losses(tmp_path / "resumed") == {step: loss for step, loss in expected.items() if step > MIDDLE}


def test_a_killed_job_resumes_bit_for_bit(worker_pool, uninterrupted, corpus, tmp_path):
    log = tmp_path / "events.jsonl"
    endless = ("--train.steps", "100000")  # the warmup, in which both are, does not depend on it
    saved = tmp_path / f"checkpoints/step-{MIDDLE:08d}"  # its name comes while later steps are taken
    kill_when(
        start_job(tmp_path, corpus, *CARRY, *endless),
        lambda: saved.exists() and f'"step": {MIDDLE + 1}' in log.read_text(),
    )
    worker_pool(1).run(train_in_pool, tmp_path, corpus, *CARRY, "--checkpoint.allow-changed", "train.steps")
    assert [event["step"] for event in events(tmp_path, "resume")] == [MIDDLE]
    assert losses(tmp_path) == losses(uninterrupted("single"))


def test_whole_tensors_are_stored_as_they_are_in_memory(uninterrupted):
    """A checkpoint has the carried states of all 8 rows, heads and channels, by the index of the layer."""
    path = uninterrupted("tp2-bf16") / f"checkpoints/step-{MIDDLE:08d}"
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {
        name: (tuple(entry.size), entry.properties.dtype)  # type: ignore[union-attr]
        for name, entry in stored.items()
        if name.startswith("carried.")
    }
    conv, state, window = (8, 2, 64), (8, 4, 45, 9), (8, 32, 2, 4, 8)
    assert found == {
        "carried.layers.0.conv": (conv, torch.bfloat16),
        "carried.layers.1.state": (state, torch.float32),
        "carried.layers.2.window": (window, torch.bfloat16),
        "carried.layers.3.state": (state, torch.float32),
        "carried.layers.4.conv": (conv, torch.bfloat16),
    }


@pytest.mark.parametrize(
    ("saved_with", "resumed_with", "warning"),
    [
        ((), ("--model.window-left", "9"), "model.window_left 32, now 9"),
        ((), ("--data.sequence-length-tokens", "48"), "is of other data"),
        (("--data.no-carry-state",), (), "has none, by data.carry_state=false"),
        ((), ("--data.no-carry-state",), None),
    ],
)
def test_what_does_not_fit_is_left_out(worker_pool, corpus, tmp_path, saved_with, resumed_with, warning):
    """One line says so, and the first step starts without carried states; a run that carries none asks for none."""
    worker_pool(1).run(train_in_pool, tmp_path, corpus, *CARRY, *saved_with, "--train.steps", "1")
    allowed = ("--checkpoint.allow-changed", "model", "data", "train.steps")
    worker_pool(1).run(train_in_pool, tmp_path, corpus, *CARRY, *resumed_with, "--train.steps", "2", *allowed)
    assert sorted(losses(tmp_path)) == [1, 2]
    lines = [event["message"] for event in events(tmp_path, "warning")]
    assert len(lines) == (warning is not None)
    for line in lines:
        assert line.startswith("the first step starts without carried states: ") and warning in line
