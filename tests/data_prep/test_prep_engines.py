"""The engines of `--executor`: what is asked of datatrove and SLURM, without a cluster. docs/data.md says what was run on one."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from based_megatron.cli import main
from based_megatron.data_prep import engines
from based_megatron.data_prep.config import PrepConfig
from based_megatron.errors import ConfigError, DataError

datatrove_tasks = pytest.importorskip("based_megatron.data_prep.datatrove_tasks")


@dataclasses.dataclass(frozen=True)
class Doubles:
    """Doubles numbers; a job that is an error is raised."""

    def __call__(self, job, tell):
        if isinstance(job, Exception):
            raise job
        tell(job, 1)
        return 2 * job


class Ranks:
    """An executor that does the jobs of some ranks at each call, as one that loses the others does."""

    def __init__(self, *calls: range):
        self.calls = list(calls)

    def __call__(self, folder: Path, tasks: int, logs: Path) -> None:
        for rank in self.calls.pop(0):
            datatrove_tasks.JobsOfRank(str(folder)).run(None, rank, tasks)


def run(tmp_path, ranks: Ranks, jobs, count=3) -> tuple[list, list]:
    """(results, what was told) of an engine with these ranks."""
    told: list[tuple[int, int]] = []
    with datatrove_tasks.DatatroveTasks(count, tmp_path / "jobs", ranks) as engine:
        return list(engine.run(Doubles(), jobs, lambda *passed: told.append(passed))), told


def test_every_job_is_done_once_whatever_the_ranks(tmp_path):
    for count in (1, 3, 20):
        results, told = run(tmp_path, Ranks(range(count)), list(range(10)), count)
        assert sorted(results) == [2 * i for i in range(10)] and sorted(told) == [(i, 1) for i in range(10)]
    assert not (tmp_path / "jobs").exists()


def test_jobs_of_lost_ranks_are_started_again(tmp_path):
    results, _ = run(tmp_path, Ranks(range(0, 1), range(1, 3)), list(range(10)))
    assert sorted(results) == [2 * i for i in range(10)]


def test_ranks_that_never_finish_end_the_run_with_the_place_of_their_logs(tmp_path):
    with pytest.raises(DataError, match=r"6 of 10 jobs did not finish.*see .*datatrove"):
        run(tmp_path, Ranks(range(0, 1), range(0)), list(range(10)))


@pytest.mark.parametrize("error", [DataError("a line"), OSError(28, "No space left on device")])
def test_an_error_of_a_job_is_that_of_the_run(tmp_path, error):
    with pytest.raises(type(error)) as raised:
        run(tmp_path, Ranks(range(3)), [1, error, 2])
    assert raised.value.args == error.args


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands of SLURM that write down how they were called, with their scripts and the names of SLURM in their environment."""
    (tmp_path / "bin").mkdir()
    log = tmp_path / "calls"
    submitted = 'case "$*" in *--parsable*) echo 77;; *) echo Submitted batch job 77;; esac'
    answers = {"sbatch": submitted, "squeue": ":", "scancel": ":", "sinfo": "echo 'main*'"}
    for name, answer in answers.items():
        path = tmp_path / "bin" / name
        path.write_text(
            f'#!/bin/sh\necho {name} "$@" >> {log}\nenv | grep ^SLURM_ >> {log}\nfor last; do :; done\n'
            f'test -f "$last" && cat "$last" >> {log}\n{answer}\n'
        )
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return log


def test_the_command_submits_itself_as_a_job_that_can_be_requeued(slurm, tmp_path, capsys):
    output = tmp_path / "made" / "out"
    words = ["in.jsonl", "--output", str(output), "--tasks", "5", "--executor", "slurm", "--slurm-options", "account=x"]
    assert main(["prep", *words]) == 0
    call = slurm.read_text()
    assert call.startswith("sbatch --parsable --job-name=prep-out-")
    for word in (f"--output={output}.slurm-%j.log", "--requeue", "--account=x", "--time=24:00:00"):
        assert word in call
    assert f"--wrap=exec {sys.executable} -m based_megatron prep {' '.join(words)}" in call
    assert f"job 77, log {output}.slurm-77.log" in capsys.readouterr().out


def test_settings_are_refused_before_anything_is_submitted(slurm, tmp_path, capsys):
    words = ["in.jsonl", "--output", str(tmp_path / "out"), "--executor", "slurm"]
    assert main(["prep", *words]) == 2
    assert "--executor slurm cannot tell how many tasks to start: set --tasks" in capsys.readouterr().err
    assert not slurm.exists()


def test_an_array_asks_for_what_was_set_and_knows_nothing_of_the_job_around_it(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4096")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    resources = datatrove_tasks.SlurmResources("01:00:00", "", 3, ("account=x",))
    array = datatrove_tasks.submit_to_slurm("prep-out", resources)(tmp_path / "jobs", 7, tmp_path / "logs")
    calls = slurm.read_text()
    assert calls.startswith("scancel --me --name=prep-out\n")  # those of a start before
    submitted = calls.partition("\nsbatch")[2]
    for line in (
        "array=0-6",
        "partition=main",
        "mem-per-cpu=3G",
        "time=01:00:00",
        "job-name=prep-out",
        "account=x",
        "requeue",
    ):
        assert f"#SBATCH --{line}\n" in submitted
    assert f"export PATH={Path(sys.executable).parent}:$PATH" in submitted
    assert "SLURM_CONF" in submitted and "SLURM_JOB_ID" not in submitted and "SLURM_MEM" not in submitted
    assert submitted.count("#!/bin/bash") == 1  # no job of statistics, which would wait for ever
    assert os.environ["SLURM_JOB_ID"] == "5"
    monkeypatch.setattr(datatrove_tasks, "POLL_SECONDS", 0)
    assert array.is_gone()


def test_an_array_is_there_while_slurm_lists_it_or_does_not_answer(monkeypatch):
    answers = {"15_1\n": 0, "": 1}
    for text, code in answers.items():
        monkeypatch.setattr(
            subprocess, "run", lambda *_, t=text, c=code, **__: subprocess.CompletedProcess([], c, t, "")
        )
        assert not datatrove_tasks.Array("prep-out").is_gone()


def test_inside_of_a_job_the_work_is_done_there(monkeypatch):
    config = PrepConfig(("in",), "out", executor="slurm", tasks=2)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert engines.is_to_be_submitted(config)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    assert not engines.is_to_be_submitted(config)
    assert not engines.is_to_be_submitted(dataclasses.replace(config, executor="local"))


def test_without_sbatch_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch here"):
        engines.submit(PrepConfig(("in",), str(tmp_path / "out")), [])
