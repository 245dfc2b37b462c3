"""Whole jobs: resume, crashes, stops, changed layouts and bad input, as a user meets them."""

import dataclasses
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from based_megatron.checkpoint.load import read_state
from based_megatron.checkpoint.store import list_checkpoints, verify
from based_megatron.cli import main
from based_megatron.config import load_config
from based_megatron.errors import BasedError, DataError
from based_megatron.run_folder.files import FILES, FOLDERS
from based_megatron.run_folder.history import read_history
from based_megatron.run_folder.lock import RunLock, read_owner, this_process
from based_megatron.train.callbacks.norms import Norms
from based_megatron.train.trainer import Trainer
from support.runs import command, events, kill_when, losses, run_job, start_command, start_job, train_in_pool, wait_for


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> Path:
    """Run folder of a job that nobody disturbed; it was told of its data by a path from the folder that it was started in."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    finished = run_job(run_dir, Path(corpus.name), before=functools.partial(os.chdir, corpus.parent))
    assert finished.returncode == 0, finished.stderr
    return run_dir


def test_a_run_is_exported_and_continues_a_prompt_from_another_folder(uninterrupted, tmp_path, monkeypatch, capsys):
    """Its tokenizer lies with the data, whose path was given from the folder that the run was started in."""
    monkeypatch.chdir(tmp_path)
    run = os.path.relpath(uninterrupted, tmp_path)
    assert main(["export", run, "--output", "hf"]) == 0
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    for model in (run, "hf"):
        assert main(["generate", model, "--prompt", "document 7", "--max-new-tokens", "4", "--device", "cpu"]) == 0
    texts = [text for text in capsys.readouterr().out.split("\n") if text.startswith("document 7")]
    assert len(texts) == 2 and len(set(texts)) == 1, "an export says what its run says"


def write_lock(folder: Path, stale_seconds: int) -> None:
    """The lock of a process elsewhere."""
    folder.mkdir(exist_ok=True)
    owner = dataclasses.replace(this_process(stale_seconds, {}), host="node7", pid=1, processes="another boot")
    (folder / "lock").write_text(json.dumps(dataclasses.asdict(owner)))


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


def test_a_run_is_written_down_and_its_folder_set_free(uninterrupted, corpus, capsys):
    """What is written means the same from any folder."""
    (start,) = read_history(uninterrupted)
    assert (start.start, start.from_step, start.ranks, start.run_name) == (1, 0, 1, uninterrupted.name)
    assert start.config["data"]["path"] == str(corpus) == load_config(str(uninterrupted / "config.yaml")).data.path
    for path in list_checkpoints(uninterrupted / "checkpoints"):
        assert read_state(path)["run_id"] == start.run_id
        assert read_state(path)["config"]["data"]["path"] == str(corpus)
    assert not (uninterrupted / "lock").exists()
    assert {path.name for path in uninterrupted.iterdir()} <= {*FILES, *FOLDERS, "stderr", "stdout"}, (
        "not in the list of names"
    )
    assert main(["data", "at", "--run", str(uninterrupted), "--step", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 8, "documents of the 8 sequences of a step"


ALLOWED = ("--checkpoint.allow-changed", "model", "train.steps")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[:3] != "std"}


@pytest.mark.parametrize(
    ("overrides", "returncode", "words"),
    [
        ((), 0, "already done: 8 of 8 steps"),
        (("--optimizer.lr", "0.01", "--train.seed", "7"), 2, "-> 0.01, train.seed 1111 -> 7"),
        (("--data.seed", "7"), 2, "data.seed 42 -> 7"),
        (("--train.steps", "9"), 2, "train.steps 8 -> 9"),
        (("--checkpoint.no-resume",), 2, "has a checkpoint of step 8"),
        (("--optimizer.lr", "0.01", "--dry-run"), 2, "-> 0.01"),
        (("--model.ffn-hidden-size", "64", "--train.steps", "9", *ALLOWED), 2, "in this model"),
    ],
    ids=["unchanged", "another experiment", "other data", "longer", "without resuming", "dry run", "another shape"],
)
def test_a_finished_run_stays_as_it_is(uninterrupted, corpus, overrides, returncode, words):
    before = contents(uninterrupted)
    job = run_job(uninterrupted, corpus, *overrides)
    assert job.returncode == returncode, job.stderr
    told = job.stderr if returncode else job.stdout
    assert words in told.splitlines()[-1] and len(job.stderr.splitlines()) == bool(returncode)
    assert contents(uninterrupted) == before


def test_a_run_without_its_checkpoints_does_not_begin_anew(uninterrupted, corpus, tmp_path):
    shutil.copytree(uninterrupted, tmp_path, ignore=shutil.ignore_patterns("checkpoints"), dirs_exist_ok=True)
    before = contents(tmp_path)
    job = run_job(tmp_path, corpus)
    assert job.returncode == 2 and contents(tmp_path) == before
    assert "has saved step 8, but there is no whole checkpoint" in job.stderr


def test_the_saved_config_repeats_the_run_in_another_folder(uninterrupted, tmp_path):
    saved = ["train", "--config", str(uninterrupted / "config.yaml"), "--run-dir", str(tmp_path)]
    job = start_command(saved, tmp_path / "stderr")
    job.wait(timeout_seconds=240)
    assert job.returncode == 0, job.stderr
    assert losses(tmp_path) == losses(uninterrupted)
    assert read_history(tmp_path)[0].run_id != read_history(uninterrupted)[0].run_id


def test_a_folder_has_one_job_at_a_time(uninterrupted, corpus, tmp_path):
    """The second is refused in one line and changes nothing, also by another path; the first does not notice."""
    (tmp_path / "link").symlink_to(tmp_path / "run")
    run, log = tmp_path / "run", tmp_path / "run" / "events.jsonl"
    first = start_job(run, corpus, "--train.lock-seconds", "600")
    wait_for(first, lambda: log.exists() and '"step": 1' in log.read_text())
    assert first.process.pid
    os.kill(first.process.pid, signal.SIGSTOP)  # so that it cannot end first
    second = start_command(command(tmp_path / "link", corpus, "--optimizer.lr", "0.01")[3:], tmp_path / "stderr")
    second.wait(timeout_seconds=60)
    assert second.returncode == 2 and len(second.stderr.splitlines()) == 1
    assert f"in use by process {first.process.pid} on " in second.stderr
    os.kill(first.process.pid, signal.SIGCONT)
    first.wait(timeout_seconds=240)
    assert first.returncode == 0 and losses(run) == losses(uninterrupted)
    assert len(read_history(run)) == 1 and "lr: 0.01" not in (run / "config.yaml").read_text()


def test_a_run_that_lost_its_folder_ends_without_another_save(corpus, tmp_path):
    """As after a pause in which another machine took it for gone: what that one wrote stays."""
    log = tmp_path / "events.jsonl"
    endless = ("--train.lock-seconds", "6", "--train.steps", "100000")
    first = start_job(tmp_path, corpus, *endless)
    wait_for(first, lambda: log.exists() and '"step": 2' in log.read_text())
    write_lock(tmp_path / "other", stale_seconds=60)
    os.replace(tmp_path / "other" / "lock", tmp_path / "lock")
    first.wait(timeout_seconds=60)
    assert first.returncode == 2 and "was taken by process 1 on node7" in first.stderr
    owner = read_owner(tmp_path)
    assert owner is not None and owner.host == "node7"
    (error,) = events(tmp_path, "error")
    assert [event["step"] for event in events(tmp_path, "checkpoint") if event["step"] >= error["step"]] == []


def refusal_in_pool(run_dir: Path, corpus: Path) -> str:
    with pytest.raises(BasedError) as refused:
        train_in_pool(run_dir, corpus)
    return str(refused.value)


def test_every_rank_learns_of_a_refusal(worker_pool, corpus, tmp_path):
    """Only rank 0 looks at the lock; the others do not wait for it for ever."""
    lock = RunLock(tmp_path, this_process(600), print)
    assert lock.try_take()
    dry_run = run_job(tmp_path, corpus, "--dry-run")
    assert dry_run.returncode == 2 and f"in use by process {os.getpid()} on" in dry_run.stderr
    first, second = worker_pool(2).run(refusal_in_pool, tmp_path, corpus)
    lock.release()
    assert first == second and f"in use by process {os.getpid()} on" in first
    assert {path.name for path in tmp_path.iterdir()} == {"stderr", "stdout"}


def test_foreign_things_in_the_folder_are_refused_before_training(corpus, tmp_path):
    (tmp_path / "heartbeat").mkdir()
    job = run_job(tmp_path, corpus)
    assert job.returncode == 2 and "heartbeat is a folder" in job.stderr and len(job.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"heartbeat", "stderr", "stdout"}


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_killed_job_resumes_bit_for_bit(uninterrupted, corpus, tmp_path, moment):
    log, unfinished = tmp_path / "events.jsonl", tmp_path / "checkpoints" / "step-00000004.tmp"
    during = {"step": lambda: log.exists() and '"step": 5' in log.read_text(), "save": unfinished.exists}[moment]
    kill_when(start_job(tmp_path, corpus), during)
    assert max(losses(tmp_path)) < 8 and (tmp_path / "lock").exists()
    resumed = run_job(tmp_path, corpus, "--monitor.no-tensorboard")
    assert resumed.returncode == 0, resumed.stderr
    assert "waiting" not in resumed.stdout, "the owner of the lock is known to be gone"
    assert "changed_settings" in resumed.stdout and "'monitor.tensorboard': [True, False]" in resumed.stdout
    (resume,) = events(tmp_path, "resume")
    assert resume["step"] in (2, 4)
    assert losses(tmp_path) == losses(uninterrupted)
    first, second = read_history(tmp_path)
    assert (second.run_id, second.start, second.from_step) == (first.run_id, 2, resume["step"])
    (event,) = events(tmp_path, "changed_settings")
    assert event["changes"] == second.changes == {"monitor.tensorboard": [True, False]}


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
    """From step 4 of the single process to two ranks, although a job elsewhere has left its lock: no rank gives up while one waits."""
    copy_checkpoint(uninterrupted, tmp_path, 4)
    write_lock(tmp_path, stale_seconds=1)
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
    finished = run_job(tmp_path, corpus, "--checkpoint.max-failed-saves", "9", before=limit_file_size)
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
    resumed = run_job(tmp_path, corpus, *DIVERGES.split())
    assert resumed.returncode == 2 and events(tmp_path, "resume")[0]["step"] == good


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
