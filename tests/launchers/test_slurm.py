"""The batch script and its submission, with a stub in the place of sbatch."""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from based_megatron.config import load_config
from based_megatron.errors import BasedError, ConfigError
from based_megatron.launchers.cli import main
from based_megatron.launchers.script import SlurmOptions, render_sbatch
from support.runs import prepare_corpus

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


def test_a_run_folder_has_one_job_name_whatever_link_leads_to_it(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    scripts = [
        render_sbatch(OPTIONS, COMMAND, dataclasses.replace(CONFIG, run_dir=str(tmp_path / name)))
        for name in ("run", "link")
    ]
    assert scripts[0] == scripts[1]


def test_the_script_has_the_settings():
    script = render(
        hang_seconds=700,
        max_failures=5,
        setup="module load cuda\nsource env/bin/activate",
        exclude="node[3-4]",
        hook="notify --to 'the team'",
        interface="ib0",
    )
    for line in (
        "run_dir='/data/runs/a b'",
        "hang_seconds=700",
        "max_failures=5",
        "exclude='node[3-4]'",
        "exclude_after_failure=yes",
        """hook_command='notify --to '"'"'the team'"'"''""",
        "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0",
        "module load cuda",
        "source env/bin/activate",
    ):
        assert line in script.splitlines()


def rank_command(**changes) -> tuple[str, str]:
    """(words of srun after the log, command of a rank) in the script."""
    lines = render(**changes).splitlines()
    srun = next(i for i, line in enumerate(lines) if line.startswith("srun "))
    words = lines[srun].partition('-%N.log"')[2].removesuffix("\\").strip()
    return words, lines[srun + 1].strip().partition("</dev/null")[0].strip()


TRAIN = "-m based_megatron train --config tiny --run-dir 'runs/a b'"


def test_srun_starts_python_itself():
    """A shell between would swallow the signals: SLURM sends them only to what srun has started."""
    assert rank_command() == ("", f"{sys.executable} {TRAIN}")


def test_words_of_srun_and_around_the_command():
    changes = dict(
        cpu_bind="cores", srun=("--mpi=none", "--network=a b"), wrap="numactl --localalloc", python="/opt/py"
    )
    assert rank_command(**changes) == (
        "--cpu-bind=cores --mpi=none '--network=a b'",
        f"numactl --localalloc /opt/py {TRAIN}",
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ranks_in_a_pyxis_container(here):
    data = here / CONFIG.data.path
    mounts = ",".join(f"{folder}:{folder}" for folder in ("/data/runs/a b", here, data))
    words, command = rank_command(container="pyxis:nvcr.io#lab/based:1")
    assert shlex.split(words) == [
        "--container-image=nvcr.io#lab/based:1",
        f"--container-mounts={mounts}",
        f"--container-workdir={here}",
    ]
    assert command == f"python3 {TRAIN}"


def test_ranks_in_an_apptainer_container(here):
    words, command = rank_command(container="apptainer:/images/based.sif", wrap="numactl -l")
    binds = f"/data/runs/a b,{here},{here / CONFIG.data.path}"
    assert words == "" and shlex.split(command) == [
        *["numactl", "-l", "apptainer", "exec", "--nv", "--bind", binds, "--pwd", str(here), "/images/based.sif"],
        *["python3", *shlex.split(TRAIN)],
    ]


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
        ({"nodes": 3}, "based preflight CONFIG --nodes 3 --gpus-per-node 2"),
        ({"container": "docker:image"}, "pyxis:IMAGE or apptainer:IMAGE"),
        ({"container": "pyxis:"}, "pyxis:IMAGE or apptainer:IMAGE"),
        ({"sbatch": ("--array=0-3",)}, "--sweep"),
        ({"sbatch": ("--arr=0-3",)}, "--sweep"),
        ({"sbatch": ("-a0-3",)}, "--sweep"),
        ({"sbatch": ("--dependency=afterok:7",)}, "--after"),
        ({"sbatch": ("--job-name=mine",)}, "a second job"),
        ({"sbatch": ("--no-requeue",)}, "--max-failures 1"),
        ({"sbatch": ("constraint=h100",)}, "no option of sbatch"),
        ({"sbatch": ("--",)}, "no option of sbatch"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        render(**changes)


def test_spare_nodes_need_a_check():
    with pytest.raises(ConfigError, match=r"--spare-nodes 1 would be idle.*set --check"):
        render(spare_nodes=1)


def test_a_run_that_never_resumes_is_refused():
    config = dataclasses.replace(CONFIG, checkpoint=dataclasses.replace(CONFIG.checkpoint, resume=False))
    with pytest.raises(ConfigError, match=r"checkpoint\.resume"):
        render_sbatch(OPTIONS, COMMAND, config)


@pytest.mark.parametrize("word", ["--constraint=h100", "--exclusive=user", "--nodelist=node7", "--mem=100G", "-Cib"])
def test_options_that_the_script_does_not_need_are_taken(word):
    assert directives(render(sbatch=(word,)))[-1] == word


@pytest.mark.parametrize("time", ["6", "5:01", "0:05:01", "1-0", "1-0:00", "1-0:00:00"])
def test_time_limits_longer_than_the_time_to_stop_are_taken(time):
    assert f"--time={time}" in directives(render(time=time))


@pytest.fixture
def fake_sbatch(tmp_path, monkeypatch):
    """An sbatch that records how it was called, and fails if REFUSE is set; a squeue that knows the jobs of QUEUED."""
    calls = tmp_path / "calls"
    programs = tmp_path / "bin"
    programs.mkdir()
    refuse = '[ -z "$REFUSE" ] || { echo no such partition >&2; exit 1; }'
    (programs / "sbatch").write_text(f'#!/bin/sh\necho "$@" >>{calls}\n{refuse}\necho "17;cluster"\n')
    (programs / "squeue").write_text('#!/bin/sh\necho "$QUEUED"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return calls


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("corpus"), documents=60)


@pytest.fixture
def launch(corpus):
    """A function that launches a run of the tiny preset on 2 ranks."""

    def run(run_dir, *options: str, overrides: tuple[str, ...] = ()) -> int:
        train = ["train", "--config", "tiny", "--run-dir", str(run_dir), "--data.path", str(corpus)]
        small = ["--data.sequence-length-tokens", "64", "--validation.interval-steps", "0"]
        ranks = ["--nodes", "1", "--gpus-per-node", "2"]
        return main(["slurm", *ranks, *options, "--", *train, *small, *overrides])

    return run


def submissions(calls: Path) -> list[list[str]]:
    """Words of each call of sbatch, without the script."""
    return [line.split()[:-1] for line in calls.read_text().splitlines()]


def test_a_job_is_tested_before_it_is_submitted(tmp_path, fake_sbatch, launch, capsys):
    assert launch(tmp_path / "run") == 0
    assert submissions(fake_sbatch) == [["--test-only"], ["--parsable"]]
    assert "job 17, log" in capsys.readouterr().out
    assert "#SBATCH --ntasks-per-node=2" in (tmp_path / "run" / "pretrain.sbatch").read_text()


def test_a_job_after_another_waits_for_its_success(tmp_path, fake_sbatch, launch):
    """The jobs that go on with the run do not: by then SLURM may not know the other job any more."""
    assert launch(tmp_path / "run", "--after", "5,6", overrides=("--data.path", "not/yet")) == 0
    waits = ["--dependency=singleton,afterok:5:6", "--kill-on-invalid-dep=yes"]
    assert submissions(fake_sbatch) == [["--test-only", *waits], ["--parsable", *waits]]
    assert "afterok" not in (tmp_path / "run" / "pretrain.sbatch").read_text()


def test_nodes_that_failed_are_left_out(tmp_path, fake_sbatch, launch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "excluded_nodes").write_text("node7 silent in job 3\nnode9 down* in job 4\n")
    launch(tmp_path / "run", "--exclude", "node[1-2]")
    assert submissions(fake_sbatch)[1] == ["--parsable", "--exclude=node[1-2],node7,node9"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("--data.path", "nowhere"), "nowhere"),
        (("--model.vocab-size", "16"), "vocab_size"),
        (("--checkpoint.load", "nowhere"), "checkpoint.load"),
        (("--checkpoint.no-resume",), "checkpoint.resume"),
        (("--model.hidden-size", "1000000000"), "GiB"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)], ids=["submit", "dry run"])
def test_what_the_ranks_would_refuse_is_not_queued(tmp_path, fake_sbatch, launch, overrides, words, dry_run):
    with pytest.raises(BasedError, match=words):
        launch(tmp_path / "run", *dry_run, overrides=overrides)
    assert not fake_sbatch.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("micro_batch", "notes"), [("16", True), ("32", False)])
def test_too_few_tokens_for_a_gpu_are_noted(tmp_path, launch, capsys, micro_batch, notes):
    sizes = ("--train.micro-batch-sequences", micro_batch, "--train.global-batch-sequences", "64")
    launch(tmp_path / "run", "--dry-run", overrides=sizes)
    assert ("1,024 tokens a rank" in capsys.readouterr().err) is notes


@pytest.mark.parametrize("name", ["done", "failures", "stop"])
def test_a_run_that_ended_can_be_submitted_again(tmp_path, fake_sbatch, launch, name):
    """The script ends at once where it finds the file, or with the next failure."""
    file = tmp_path / "run" / name
    file.parent.mkdir()
    file.touch()
    launch(tmp_path / "run")
    assert not file.exists()


def test_a_stop_file_is_kept_for_the_job_before(tmp_path, fake_sbatch, launch, monkeypatch):
    monkeypatch.setenv("QUEUED", "16")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    launch(tmp_path / "run")
    assert (tmp_path / "run" / "stop").exists()


def test_a_refusal_of_slurm_is_one_line(tmp_path, fake_sbatch, launch, monkeypatch):
    monkeypatch.setenv("REFUSE", "1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "done").touch()
    with pytest.raises(ConfigError, match="no such partition"):
        launch(tmp_path / "run")
    assert submissions(fake_sbatch) == [["--test-only"]] and (tmp_path / "run" / "done").exists()


def test_a_dry_run_prints_the_script_and_leaves_nothing(tmp_path, fake_sbatch, launch, capsys):
    assert launch(tmp_path / "run", "--dry-run") == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH")
    assert not fake_sbatch.exists() and not (tmp_path / "run").exists()


def test_a_machine_without_slurm_is_named(tmp_path, launch, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no sbatch"):
        launch(tmp_path / "run")


def test_every_option_of_sbatch_and_srun_is_kept(tmp_path, launch, capsys):
    options = ["--sbatch=--constraint=h100", "--sbatch=--reservation=lab", "--srun=--mpi=none", "--srun=--label"]
    launch(tmp_path / "run", *options, "--dry-run")
    script = capsys.readouterr().out
    assert directives(script)[-2:] == ["--constraint=h100", "--reservation=lab"]
    assert " --mpi=none --label \\\n" in script


def test_a_job_of_a_preset_says_based_once():
    config = dataclasses.replace(CONFIG, run_dir="/data/runs/based-360m")
    assert directives(render_sbatch(OPTIONS, COMMAND, config))[0].startswith("--job-name=based-360m-")


def test_only_training_is_submitted():
    with pytest.raises(ConfigError, match="'generate'"):
        main(["slurm", "--nodes", "1", "--", "generate"])


def test_a_sweep_is_a_job_for_each_combination(tmp_path, fake_sbatch, launch):
    launch(tmp_path, "--sweep", "optimizer.lr=1e-3,8e-4", "--sweep", "data.isolate_documents=true,false")
    scripts = {path.parent.name: path.read_text() for path in tmp_path.glob("*/pretrain.sbatch")}
    assert sorted(scripts) == [
        f"optimizer.lr={lr},data.isolate_documents={isolate}"
        for lr in ("1e-3", "8e-4")
        for isolate in ("false", "true")
    ]
    folder = tmp_path / "optimizer.lr=8e-4,data.isolate_documents=false"
    assert f"--optimizer.lr 8e-4 --data.no-isolate-documents --run-dir {folder} " in scripts[folder.name]
    assert len({directives(script)[0] for script in scripts.values()}) == 4
    assert [words[0] for words in submissions(fake_sbatch)] == ["--test-only", "--parsable"] * 4


def test_a_sweep_with_one_run_that_cannot_start_submits_none(tmp_path, fake_sbatch, launch):
    with pytest.raises(ConfigError, match="num_heads"):
        launch(tmp_path / "run", "--sweep", "model.num_heads=4,3")
    assert not fake_sbatch.exists()


@pytest.mark.parametrize(
    "sweep", ["optimizer.lr", "=1", "optimizer.lr=", "optimizer.lr=1,1", "optimizer.lr=1,,2", "data.path=a/b"]
)
def test_a_sweep_that_means_nothing_is_refused(tmp_path, launch, sweep):
    with pytest.raises(ConfigError, match="--sweep"):
        launch(tmp_path / "run", "--sweep", sweep)


def test_a_setting_is_swept_once(tmp_path, launch):
    with pytest.raises(ConfigError, match="twice"):
        launch(tmp_path / "run", "--sweep", "optimizer.lr=1", "--sweep", "optimizer.lr=2")
