"""The job that goes on if the batch script itself is killed, with stubs in the place of SLURM's programs."""

import pytest
from script_job import CHECKPOINT, Job, cause


@pytest.fixture
def guarded(tmp_path, monkeypatch) -> Job:
    """A job with a successor."""
    monkeypatch.chdir(tmp_path)
    return Job(tmp_path, successor=True, exclude="node9")


WAITS = "--exclude=node9 --dependency=singleton,afternotok:7 --kill-on-invalid-dep=yes"
KILL_SCRIPT = "kill -KILL $PPID $(pgrep -P $PPID | grep -vx $$) $$"
"""Shell of ranks that are killed with the script and all that it has started, as SLURM does it."""


def successor(job: Job) -> str:
    """The call that submits it."""
    return f"sbatch --parsable {WAITS} {job.folder}/run/pretrain.sbatch of 7, killed"


def test_a_script_that_is_killed_leaves_a_successor(guarded):
    assert guarded.run(KILL_SCRIPT) == -9
    assert guarded.read("calls") == [successor(guarded)]


@pytest.mark.parametrize(
    ("ranks", "after"),
    [
        ("touch run/done", []),
        ("touch run/stopped", []),
        (cause(0, 0, 2, "ConfigError: no") + "exit 2", []),
        (CHECKPOINT % (3, 3), ["requeue"]),
        ("echo 1 -1 >run/failures; exit 9", []),
        ("echo CANCELLED >state; exit 9", []),
        ("/bin/sleep 0.2; kill -TERM $PPID; exec /bin/sleep 5", ["requeue"]),
        ("trap '' USR2; /bin/sleep 0.2; kill -TERM $PPID; /bin/sleep 0.3; " + KILL_SCRIPT, []),
    ],
    ids=[
        "done",
        "stopped",
        "user's error",
        "pause",
        "failures",
        "cancelled",
        "preempted",
        "killed after SLURM's request",
    ],
)
def test_at_every_other_end_the_successor_is_cancelled(guarded, ranks, after):
    """Before the job is requeued: it has another one in its next start."""
    guarded.run(ranks)
    assert guarded.read("calls") == [successor(guarded), "scancel 8", *after]
    assert not list(guarded.folder.glob("run/logs/*.successor"))


def test_a_start_that_lost_its_node_leaves_no_second_successor(guarded):
    guarded.run(KILL_SCRIPT)
    guarded.run("touch run/done", SLURM_RESTART_COUNT="1")
    assert guarded.read("calls") == ["scancel 8", successor(guarded), "scancel 8"]


KILLED = "JobState=FAILED Reason=JobLaunchFailure ExitCode=0:9"


@pytest.mark.parametrize(
    ("ended", "goes_on"),
    [
        (KILLED, True),
        ("", True),
        ("JobState=NODE_FAIL Reason=NodeDown ExitCode=0:0", True),
        ("JobState=CANCELLED Reason=None ExitCode=0:15", False),
        ("JobState=FAILED Reason=NonZeroExitCode ExitCode=1:0", False),
    ],
    ids=["killed", "forgotten", "lost", "cancelled", "ended by itself"],
)
def test_a_successor_goes_on_only_after_a_killed_script(job, ended, goes_on):
    (job.folder / "ended-6").write_text(ended)
    assert job.run("touch run/done", BASED_KILLED_JOB="6") == 0
    assert (job.folder / "run/done").exists() is goes_on
    assert ("nothing to go on with: job 6" in job.log) is not goes_on


def test_scripts_that_are_killed_are_failures(job):
    (job.folder / "ended-6").write_text(KILLED)
    env = {"BASED_KILLED_JOB": "6"}
    assert job.run(KILL_SCRIPT, **env) == -9 and job.read("run/failures") == ["1 -1"]
    assert job.read("hooks") == [f"{job.folder / 'run'} crash: the batch script of job 6 was killed"]
    assert job.run("touch started", **env) == 1 and not (job.folder / "started").exists()
    assert "2 failures in a row without a newer checkpoint" in job.log


def test_a_successor_that_is_requeued_is_a_job_like_any_other(job):
    job.run('[ -z "$BASED_KILLED_JOB" ] && touch run/done', BASED_KILLED_JOB="6", SLURM_RESTART_COUNT="1")
    assert "was killed" not in job.log and job.read("run/failures") == [] and (job.folder / "run/done").exists()
