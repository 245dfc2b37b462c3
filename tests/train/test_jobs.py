"""Whole jobs: resume, crashes, stops, changed layouts and bad input, as a user meets them."""

import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from based_megatron.checkpoint.store import list_checkpoints, verify
from based_megatron.cli import main
from based_megatron.errors import DataError
from based_megatron.train.callbacks.norms import Norms
from based_megatron.train.trainer import Trainer
from support.runs import command, events, kill_when, losses, run_job, start_job, train_in_pool


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> Path:
    """Run folder of a job that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    finished = run_job(run_dir, corpus)
    assert finished.returncode == 0, finished.stderr
    return run_dir


def copy_checkpoint(source: Path, run_dir: Path, step: int) -> None:
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(source / name, run_dir / name)


def test_the_loss_falls_and_the_run_is_marked_done(uninterrupted):
    curve = losses(uninterrupted)
    assert sorted(curve) == list(range(1, 9))
    assert curve[8] < curve[1] - 0.02
    assert (uninterrupted / "done").exists() and (uninterrupted / "config.yaml").exists()
    assert [event["step"] for event in events(uninterrupted, "validation")] == [4, 8]
    assert len(list_checkpoints(uninterrupted / "checkpoints")) == 4


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_killed_job_resumes_bit_for_bit(uninterrupted, corpus, tmp_path, moment):
    log, unfinished = tmp_path / "events.jsonl", tmp_path / "checkpoints" / "step-00000004.tmp"
    during = {"step": lambda: log.exists() and '"step": 5' in log.read_text(), "save": unfinished.exists}[moment]
    kill_when(start_job(tmp_path, corpus), during)
    assert max(losses(tmp_path)) < 8
    resumed = run_job(tmp_path, corpus)
    assert resumed.returncode == 0, resumed.stderr
    assert events(tmp_path, "resume")[0]["step"] in (2, 4)
    assert losses(tmp_path) == losses(uninterrupted)


def test_sigterm_stops_with_a_checkpoint(uninterrupted, corpus, tmp_path):
    log = tmp_path / "events.jsonl"
    process = start_job(tmp_path, corpus, "--checkpoint.interval-steps", "0")
    kill_when(process, lambda: log.exists() and '"event": "step"' in log.read_text(), signal.SIGTERM)
    assert process.returncode == 0
    (stop,) = events(tmp_path, "stop")
    assert stop["reason"] == "SIGTERM" and not (tmp_path / "done").exists()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == [f"step-{stop['step']:08d}"]


def check_resumed(uninterrupted: Path, run_dir: Path) -> None:
    """From step 4 on, the losses of another layout."""
    expected, found = losses(uninterrupted), losses(run_dir)
    assert sorted(found) == [5, 6, 7, 8]
    assert [found[step] for step in found] == pytest.approx([expected[step] for step in found], abs=1e-5)


@pytest.mark.parametrize(
    "overrides", [("--parallel.tensor", "2"), ("--parallel.pipeline", "2"), ("--parallel.zero-stage", "3")]
)
def test_another_layout_resumes(worker_pool, uninterrupted, corpus, tmp_path, overrides):
    """From step 4 of the single process to two ranks."""
    copy_checkpoint(uninterrupted, tmp_path, 4)
    assert worker_pool(2).run(train_in_pool, tmp_path, corpus, *overrides) == [True, True]
    check_resumed(uninterrupted, tmp_path)


@pytest.mark.slow
def test_launched_ranks_resume(uninterrupted, corpus, tmp_path):
    """As a user starts them: `based launch local` and two interpreters, which import everything."""
    copy_checkpoint(uninterrupted, tmp_path, 4)
    done = subprocess.run(
        command(tmp_path, corpus, "--parallel.zero-stage", "3", nproc=2), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").exists()
    check_resumed(uninterrupted, tmp_path)


def test_a_corrupt_newest_checkpoint_is_told_and_passed_over(uninterrupted, corpus, tmp_path):
    for step in (2, 4):
        copy_checkpoint(uninterrupted, tmp_path, step)
    victim = next((tmp_path / "checkpoints" / "step-00000004").glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-100])
    resumed = run_job(tmp_path, corpus)
    assert resumed.returncode == 0, resumed.stderr
    assert [event["step"] for event in events(tmp_path, "resume")] == [2]
    assert "step-00000004" in events(tmp_path, "warning")[0]["message"]
    assert losses(tmp_path) == {step: loss for step, loss in losses(uninterrupted).items() if step > 2}


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_a_full_disk_costs_checkpoints_but_not_the_run(uninterrupted, corpus, tmp_path):
    """No file may grow beyond a limit that tensors reach and logs do not. Only the last save, which must work, ends the job."""
    finished = run_job(tmp_path, corpus, before=limit_file_size)
    assert finished.returncode == 2
    assert "was not saved" in finished.stderr.splitlines()[-1]
    assert [event["step"] for event in events(tmp_path, "warning")] == [2, 4, 6, 8]
    assert losses(tmp_path) == losses(uninterrupted)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("--data.path", "nowhere"), "nowhere"),
        (("--model.vocab-size", "200"), "model.vocab_size"),
        (("--parallel.zero-stage", "0"), "parallel.zero_stage=1"),
        (("--data.sequence-length-tokens", "1000000"), "data.sequence_length_tokens"),
        (("--run-dir", "/proc/nowhere"), "run_dir"),
    ],
)
def test_bad_input_is_one_line_before_any_work(corpus, tmp_path, capsys, overrides, expected):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        returncode = main(command(tmp_path / "run", corpus, *overrides)[3:])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert returncode == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("based: error: ") and expected in line
    assert not (tmp_path / "run" / "events.jsonl").exists()


DIVERGES = (
    "--optimizer.lr 1e18 --optimizer.weight-decay 0 --optimizer.clip-grad-norm 0 --schedule.warmup-steps 3 "
    "--checkpoint.interval-steps 1 --checkpoint.keep-last 2 --train.max-skipped-steps 5 --guards.no-rollback"
)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(corpus, tmp_path, capsys):
    """Steps whose gradient is not finite are not saved, and prune nothing."""
    finished = run_job(tmp_path, corpus, *DIVERGES.split())
    assert finished.returncode == 2
    skipped = [event["step"] for event in events(tmp_path, "skip")]
    assert skipped == list(range(skipped[0], skipped[0] + 5)) and skipped[0] > 1
    good = skipped[0] - 1
    kept = list_checkpoints(tmp_path / "checkpoints")
    assert kept[0].name == f"step-{good:08d}" and [verify(path) for path in kept] == [[]] * len(kept)
    (error,) = finished.stderr.splitlines()
    assert f"the newest checkpoint is step {good}: lower optimizer.lr" in error
    advised = error.partition("`based ")[2].partition("`")[0]
    assert advised == f"data at --run {tmp_path} --data-step {skipped[0]}"
    assert main(advised.split()) == 0
    assert len(capsys.readouterr().out.splitlines()) > 8, "documents of the 8 sequences of a step"
    resumed = run_job(tmp_path, corpus, "--train.steps", str(good), "--train.max-skipped-steps", "1")
    assert resumed.returncode == 0, resumed.stderr
    assert events(tmp_path, "resume")[0]["step"] == good


def test_other_data_is_refused_on_resume(uninterrupted, corpus, tmp_path):
    copy_checkpoint(uninterrupted, tmp_path, 4)
    finished = run_job(tmp_path, corpus, "--data.seed", "7")
    assert finished.returncode == 2
    assert "data.allow_changed" in finished.stderr


def train_on_damage(run_dir: Path, data: Path, *overrides: str) -> str:
    """What a rank says of a shard that is damaged after the second step."""

    def damage(trainer: Trainer, report: Any) -> None:
        if report.step == 2 and trainer.topology.is_logger:
            shard = data / "train" / "shard-00000.tar"
            shard.write_bytes(bytes(shard.stat().st_size))
        dist.barrier()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Norms, "post_step", lambda _, *of_step: damage(*of_step))
        with pytest.raises(DataError) as error:
            train_in_pool(run_dir, data, *overrides)
    return str(error.value)


def test_a_shard_that_is_damaged_in_the_middle_of_a_run_ends_all_ranks_with_one_line(worker_pool, corpus, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    job = (tmp_path / "run", data, "--parallel.context", "2", "--data.num-workers", "0")
    said = worker_pool(2).run(train_on_damage, *job)
    assert said[0] == said[1] and "\n" not in said[0]
    assert "train/shard-00000.tar is damaged: sample 00000000 does not match its hash" in said[0]
    assert max(losses(tmp_path / "run")) == 2
