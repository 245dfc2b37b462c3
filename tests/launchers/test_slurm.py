"""The batch script and its submission, with a stub in the place of sbatch."""

import dataclasses
import os
import shutil
import subprocess

import pytest

from based_megatron.config import load_config
from based_megatron.errors import ConfigError
from based_megatron.launchers.cli import main
from based_megatron.launchers.slurm import SlurmOptions, render_sbatch

COMMAND = ["train", "--config", "tiny", "--run-dir", "runs/a b"]
CONFIG = dataclasses.replace(load_config("tiny"), run_dir="/data/runs/a b")
OPTIONS = SlurmOptions(nodes=2, gpus_per_node=2, cpus_per_task=6, time="2:00:00", stop_seconds=300)


def render(**changes) -> str:
    return render_sbatch(dataclasses.replace(OPTIONS, **changes), COMMAND, CONFIG)


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_directives_are_those_of_the_options():
    first, *others = directives(render())
    assert first.startswith("--job-name='based-a b-")
    assert others == [
        "--dependency=singleton",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--cpus-per-task=6",
        "--time=2:00:00",
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        "--output='/data/runs/a b/slurm-%j.log'",
        "--gpus-per-node=2",
        "--exclusive",
        "--mem=0",
    ]


def test_directives_come_before_any_command():
    lines = render().splitlines()
    assert lines[0] == "#!/bin/bash"
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]


def test_optional_directives_appear_where_they_are_set():
    options = dict(partition="main", account="lab", qos="high", exclude="node[3-4]", sbatch=("--constraint=h100",))
    assert directives(render(**options, exclusive=False))[-5:] == [
        "--partition=main",
        "--account=lab",
        "--qos=high",
        "--exclude='node[3-4]'",
        "--constraint=h100",
    ]


def test_a_cpu_cluster_asks_for_no_gpus():
    lines = directives(render(gpus_per_node=0, tasks_per_node=2))
    assert "--ntasks-per-node=2" in lines
    assert not [line for line in lines if "gpu" in line]


def test_runs_in_two_folders_of_one_name_have_two_job_names():
    other = dataclasses.replace(CONFIG, run_dir="/data/other/a b")
    assert directives(render())[0] != directives(render_sbatch(OPTIONS, COMMAND, other))[0]


def test_the_script_has_the_settings():
    script = render(hang_seconds=700, max_failures=5, setup="module load cuda\nsource env/bin/activate")
    for line in (
        "run_dir='/data/runs/a b'",
        "stop_file=$run_dir/stop  # asks the ranks to save and end",
        "hang_seconds=700",
        "max_failures=5",
        "module load cuda",
        "source env/bin/activate",
    ):
        assert line in script.splitlines()


def test_srun_starts_python_itself():
    """A shell between would swallow the signals: SLURM sends them only to what srun has started."""
    lines = render().splitlines()
    srun = next(i for i, line in enumerate(lines) if line.startswith("srun "))
    assert lines[srun + 1].endswith("-m based_megatron train --config tiny --run-dir 'runs/a b' </dev/null &")


def test_the_script_is_legal_bash(tmp_path):
    script = tmp_path / "script"
    script.write_text(render())
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_script_passes_shellcheck(tmp_path):
    script = tmp_path / "script"
    script.write_text(render())
    result = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert result.stdout == ""


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"nodes": 0}, "--nodes"),
        ({"gpus_per_node": 0}, "--tasks-per-node"),
        ({"cpus_per_task": 0}, "--cpus-per-task"),
        ({"max_failures": 0}, "--max-failures"),
        ({"hang_seconds": 120}, "parallel.timeout_seconds"),
        ({"nodes": 3}, "global_batch_sequences"),
        ({"time": "5", "stop_seconds": 300}, "--stop-seconds 300"),
        ({"time": "5:00", "stop_seconds": 300}, "--stop-seconds 300"),
        ({"time": "0:05:00", "stop_seconds": 300}, "--stop-seconds 300"),
        ({"time": "tomorrow"}, "--time 'tomorrow'"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        render(**changes)


@pytest.mark.parametrize("time", ["6", "5:01", "0:05:01", "1-0", "1-0:00", "1-0:00:00"])
def test_time_limits_longer_than_the_time_to_stop_are_taken(time):
    assert f"--time={time}" in directives(render(time=time))


@pytest.fixture
def fake_sbatch(tmp_path, monkeypatch):
    """An sbatch that records how it was called, and fails if REFUSE is set."""
    calls = tmp_path / "calls"
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    refuse = '[ -z "$REFUSE" ] || { echo no such partition >&2; exit 1; }'
    program.write_text(f'#!/bin/sh\necho "$1" >>{calls}\n{refuse}\necho "17;cluster"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return calls


def launch(run_dir, *options: str) -> int:
    train = ["--", "train", "--config", "tiny", "--run-dir", str(run_dir)]
    return main(["slurm", "--nodes", "1", "--gpus-per-node", "2", *options, *train])


def test_a_job_is_tested_before_it_is_submitted(tmp_path, fake_sbatch, capsys):
    assert launch(tmp_path / "run") == 0
    assert fake_sbatch.read_text().split() == ["--test-only", "--parsable"]
    assert "job 17, log" in capsys.readouterr().out
    assert "#SBATCH --ntasks-per-node=2" in (tmp_path / "run" / "pretrain.sbatch").read_text()


def test_a_finished_run_can_be_given_more_steps(tmp_path, fake_sbatch):
    """The script ends at once where it finds the file."""
    done = tmp_path / "run" / "done"
    done.parent.mkdir()
    done.touch()
    launch(tmp_path / "run")
    assert not done.exists()


def test_a_refusal_of_slurm_is_one_line(tmp_path, fake_sbatch, monkeypatch):
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(ConfigError, match="no such partition"):
        launch(tmp_path / "run")
    assert fake_sbatch.read_text().split() == ["--test-only"]


def test_a_dry_run_prints_the_script_and_leaves_nothing(tmp_path, fake_sbatch, capsys):
    assert launch(tmp_path / "run", "--dry-run") == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH")
    assert not fake_sbatch.exists() and not (tmp_path / "run").exists()


def test_a_machine_without_slurm_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no sbatch"):
        launch(tmp_path / "run")


def test_every_option_of_sbatch_is_kept(tmp_path, capsys):
    launch(tmp_path / "run", "--sbatch=--constraint=h100", "--sbatch=--reservation=lab", "--dry-run")
    assert directives(capsys.readouterr().out)[-2:] == ["--constraint=h100", "--reservation=lab"]


def test_a_job_of_a_preset_says_based_once():
    config = dataclasses.replace(CONFIG, run_dir="/data/runs/based-360m")
    assert directives(render_sbatch(OPTIONS, COMMAND, config))[0].startswith("--job-name=based-360m-")


def test_only_training_is_submitted():
    with pytest.raises(ConfigError, match="'generate'"):
        main(["slurm", "--nodes", "1", "--", "generate"])
