"""What the batch script does after each end of the ranks, with stubs in the place of SLURM's programs."""

import os

import pytest
from script_job import CHECKPOINT, Job, cause

LOGS = "$(dirname $NCCL_DEBUG_FILE)"


def test_a_finished_run_ends_well(job, tmp_path):
    assert job.run("touch run/done") == 0
    assert job.read("calls") == [] and job.read("hooks") == [f"{tmp_path / 'run'} done: the run is done"]
    assert job.run("exit 1") == 0 and "already done" in job.log


def test_a_pause_goes_on_in_the_same_job(job):
    assert job.run(CHECKPOINT % (3, 3)) == 1
    assert job.read("calls") == ["requeue"] and job.read("hooks") == []
    assert job.read("run/failures") == ["0 3"]


def test_a_stop_by_the_owner_ends_well(job):
    assert job.run("mv run/stop run/stopped 2>/dev/null; touch run/stopped") == 0
    assert job.read("calls") == [] and job.read("hooks")[0].endswith("stop: stopped by " + str(job.folder / "run/stop"))


@pytest.mark.parametrize("when", ["waiting", "starting"])
def test_a_stop_file_is_never_deleted(job, when):
    """One of a waiting job ends it before its ranks start; one that is made later is for the ranks to find."""
    if when == "waiting":
        (job.folder / "run").mkdir()
        (job.folder / "run/stop").touch()
        assert job.run("touch started") == 0
        assert "before it started" in job.log and not (job.folder / "started").exists()
        assert (job.folder / "run/stopped").exists() and not (job.folder / "run/stop").exists()
    else:
        assert job.run("touch run/stop") == 0
        assert (job.folder / "run/stop").exists()


def test_a_failed_run_that_is_to_stop_does_not_start_again(job):
    assert job.run("touch run/stop; exit 1") == 1
    assert job.read("calls") == [] and "asks for a stop" in job.log


def test_failures_without_a_newer_checkpoint_end_the_run(job):
    assert job.run(CHECKPOINT % (3, 3) + "; exit 9") == 1
    assert job.read("calls") == ["requeue"] and job.read("run/failures") == ["1 3"]
    assert [line.split(" ", 1)[1] for line in job.read("hooks")] == ["crash: status 9"]
    assert job.run("exit 9") == 1
    assert job.read("calls") == [] and job.read("run/failures") == ["2 3"]
    assert "2 failures in a row without a newer checkpoint (newest: step 3)" in job.read("hooks")[0]


def test_a_newer_checkpoint_begins_the_count_anew(job):
    for step in (3, 10, 123456789):
        state = f"""; echo '{{"good": true}}' >run/checkpoints/step-{step:08d}/state.json"""
        job.run(CHECKPOINT % (step, step) + state + "; exit 9")
        assert job.read("calls") == ["requeue"] and job.read("run/failures") == [f"1 {step}"]


@pytest.mark.parametrize(
    "ranks",
    [
        "mkdir -p run/checkpoints/step-00000009.tmp && touch run/checkpoints/step-00000009.tmp/manifest.json",
        "mkdir -p run/checkpoints/step-00000009",
        "mkdir -p run/checkpoints/step-00000009.old && touch run/checkpoints/step-00000009.old/manifest.json",
        CHECKPOINT % (2, 2),
        CHECKPOINT % (9, 9) + """; echo '{"step": 9, "good": false}' >run/checkpoints/step-00000009/state.json""",
    ],
    ids=["unfinished", "without a manifest", "replaced", "older", "bad"],
)
def test_what_is_no_progress(job, ranks):
    job.run(CHECKPOINT % (3, 3) + "; exit 9")
    job.run("rm -r run/checkpoints; " + ranks + "; exit 9")
    assert job.read("calls") == [] and job.read("run/failures") == ["2 3"]


def test_a_time_limit_without_a_checkpoint_is_a_failure_and_a_preemption_is_none(job):
    for number, calls, failures in [("TERM", ["requeue"], "0 -1"), ("USR1", ["requeue"], "1 -1"), ("USR1", [], "2 -1")]:
        job.run(f"trap '' USR2; /bin/sleep 0.2; kill -{number} $PPID; /bin/sleep 0.2")
        assert job.read("calls") == calls and job.read("run/failures") == [failures]


def test_ranks_that_die_of_the_request_to_pause_did_not_fail(job):
    """Before they have a handler."""
    job.run("/bin/sleep 0.3; kill -TERM $PPID; exec /bin/sleep 5")
    assert "ended with status 140" in job.log and job.read("calls") == ["requeue"]
    assert job.read("run/failures") == ["0 -1"] and job.read("hooks") == []


def test_the_ranks_are_asked_to_pause(job):
    wait_for_it = "for i in {1..100}; do [ ! -e asked ] || break; /bin/sleep 0.05; done"
    job.run(f"trap 'touch asked' USR2; /bin/sleep 0.2; kill -USR1 $PPID; {wait_for_it}")
    assert (job.folder / "asked").exists() and (job.folder / "run/pause").exists()
    job.run("[ ! -e run/pause ] || exit 9")
    assert "ended with status 0" in job.log


def test_a_users_error_ends_the_run_whatever_other_ranks_say(job):
    ranks = cause(1, 0, 2, "ConfigError: change optimizer.lr") + cause(
        0, 1, 1, "RuntimeError: Connection closed by peer"
    )
    assert job.run(ranks + "exit 143") == 2
    assert job.read("calls") == [] and "cause: rank 1 on node2: ConfigError: change optimizer.lr" in job.log
    (crash,) = job.read("hooks")
    assert crash.endswith("a new start would fail the same way: rank 1 on node2: ConfigError: change optimizer.lr")


def test_the_first_cause_is_shown(job):
    ranks = cause(0, 1, 1, "RuntimeError: Connection closed by peer") + cause(1, 0, 1, "OSError: no")
    job.run(ranks + "exit 143")
    assert "cause: rank 1 on node2: OSError: no\n" in job.log and job.read("calls") == ["requeue"]


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        (cause(0, 1, 1, "RuntimeError: Connection closed by peer"), "node2: task 1: Killed"),
        ("", "node2: task 1: Killed"),
        (cause(0, 0, 1, "MemoryError: no"), "rank 0 on node1: MemoryError: no"),
    ],
    ids=["aftermath", "nothing", "a cause"],
)
def test_a_rank_that_was_killed_is_a_cause(job, other, shown):
    srun = "echo 'srun: error: node1: task 0: Exited with exit code 1' >&2; echo 'srun: error: node2: task 1: Killed' >&2; "
    job.run(other + srun + "exit 137")
    assert f"cause: {shown}\n" in job.log and "srun: error: node2: task 1: Killed\n" in job.log


@pytest.mark.parametrize("before", ["no disk", "folder in its place", "garbage", "empty"])
def test_a_counter_that_cannot_be_kept_ends_the_run(job, before):
    ranks = {
        "no disk": "ln -s nowhere/failures run/failures",
        "folder in its place": "mkdir run/failures",
        "garbage": "echo many >run/failures",
        "empty": ">run/failures",
    }
    assert job.run(ranks[before] + "; exit 9") == 1
    assert job.read("calls") == [] and "giving up" in job.log


def test_a_run_folder_that_cannot_be_written_ends_the_run(job):
    (job.folder / "run").touch()
    assert job.run("touch started") == 1
    assert not (job.folder / "started").exists() and "giving up: cannot make" in job.log


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_job_that_slurm_is_ending_does_not_start_again(job, state):
    (job.folder / "state").write_text(state)
    assert job.run("exit 9") == 1
    assert job.read("calls") == [] and job.read("run/failures") == []


def test_a_job_that_cannot_be_requeued_goes_on_in_a_new_one(job):
    job.run(CHECKPOINT % (3, 3), NO_REQUEUE="1")
    assert job.read("calls") == [f"sbatch --parsable {job.folder}/run/pretrain.sbatch of 7"]


def test_a_job_of_a_restarted_one_has_no_restarts_of_its_own(job):
    """SLURM would hand on the number, and the lock tells a requeued job by it."""
    job.run(CHECKPOINT % (3, 3), NO_REQUEUE="1", SLURM_RESTART_COUNT="2")
    assert job.read("calls") == [f"sbatch --parsable {job.folder}/run/pretrain.sbatch of 7"]


HANG = """
echo >run/heartbeat
touch $(dirname $NCCL_DEBUG_FILE)/rank-0000-node1.log $(dirname $NCCL_DEBUG_FILE)/rank-0001-node2.log
"""


def test_the_node_of_a_silent_rank_is_excluded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Job(tmp_path, exclude="node9")
    job.run(HANG + cause(0, 1, 1, "RuntimeError: Timed out waiting 20000ms") + "exit 143")
    assert job.read("calls") == [f"sbatch --parsable --exclude=node9,node2 {tmp_path}/run/pretrain.sbatch of 7"]
    (line,) = job.read("run/excluded_nodes")
    assert line.startswith("node2 silent in job 7 at 20")


def test_a_node_is_excluded_once_and_stays_so(job):
    ranks = HANG + cause(0, 1, 1, "RuntimeError: Timed out waiting") + "exit 143"
    job.run(CHECKPOINT % (3, 3) + "; " + ranks)
    job.run(CHECKPOINT % (4, 4) + "; " + ranks)
    assert len(job.read("run/excluded_nodes")) == 1 and job.read("calls") == ["requeue"]


def test_if_every_rank_says_something_no_node_is_to_blame(job):
    job.run(HANG + cause(0, 1, 1, "RuntimeError: Timed out") + cause(1, 1, 1, "RuntimeError: Timed out") + "exit 143")
    assert job.read("calls") == ["requeue"] and job.read("run/excluded_nodes") == []


def test_the_node_of_a_rank_that_was_stopped_is_excluded(job):
    """Its rank says so once it goes on to be killed; all others have lost it."""
    note = "RuntimeError: this process did not run for 17 s: it was stopped; Connection closed by peer"
    job.run(HANG + cause(0, 1, 1, "RuntimeError: Timed out") + cause(1, 0, 1, note) + "exit 143")
    (line,) = job.read("run/excluded_nodes")
    assert line.startswith("node2 stopped in job 7") and f"cause: rank 1 on node2: {note}\n" in job.log


def test_what_ranks_failed_of_before_is_kept_and_not_read_again(job):
    job.run(cause(0, 0, 2, "ConfigError: no") + "exit 2")
    (job.folder / "run/failures").unlink(missing_ok=True)
    job.run("exit 9")
    assert "cause: no rank left any" in job.log
    assert len(list(job.folder.glob("run/logs/*/errors-before/rank-00000.txt"))) == 1


def test_ranks_that_crash_do_not_cost_their_node(job):
    job.run(HANG + cause(0, 0, 1, "ValueError: no") + "exit 143")
    assert job.read("calls") == ["requeue"] and job.read("run/excluded_nodes") == []


def test_if_no_rank_says_anything_no_node_is_to_blame(job):
    job.run(HANG + "touch run/hung; exit 143")
    assert job.read("run/excluded_nodes") == []
    assert job.read("calls") == [f"sbatch --parsable {job.folder}/run/pretrain.sbatch of 7"]


def test_a_rank_whose_watchdog_spoke_is_not_silent(job):
    watchdog = "echo 'Watchdog caught collective operation timeout' >$(dirname $NCCL_DEBUG_FILE)/rank-0000-node1.log; "
    job.run(HANG + watchdog + "touch run/hung; exit 134")
    assert [line.split()[0] for line in job.read("run/excluded_nodes")] == ["node2"]


def test_nodes_that_slurm_has_lost_are_excluded(job):
    (job.folder / "sinfo").write_text("node1 allocated\nnode2 down*\nnode2 down*\n")
    job.run("exit 9")
    assert [line.split()[:2] for line in job.read("run/excluded_nodes")] == [["node2", "down*"]]
    assert job.read("calls") == [f"sbatch --parsable --exclude=node2 {job.folder}/run/pretrain.sbatch of 7"]


def event(kind: str, hosts: str) -> str:
    """Shell of a rank that records an event which names hosts."""
    return f"""echo '{{"time": 1.5, "step": 3, "event": "{kind}", "message": "no", {hosts}, "stacks": "stacks"}}' >>run/events.jsonl; """


@pytest.mark.parametrize(
    ("hosts", "excluded"),
    [
        ('"hosts": ["node2.cluster"]', ["node2"]),
        ('"host": "node1"', ["node1"]),
        ('"hosts": ["node1", "node2"]', ["node1", "node2"]),
        ('"hosts": []', []),
        ('"hosts": ["login"]', []),
    ],
)
def test_nodes_that_the_ranks_blame_for_a_hang_are_excluded(job, hosts, excluded):
    (job.folder / "run").mkdir()
    (job.folder / "run/events.jsonl").write_text('{"event": "hang", "hosts": ["node1", "node2"]}\n')
    job.run(event("hang", hosts) + "exit 9")
    assert [line.split()[:2] for line in job.read("run/excluded_nodes")] == [[node, "hang"] for node in excluded]


@pytest.mark.parametrize("asked", [True, False])
def test_stragglers_are_excluded_if_asked(tmp_path, monkeypatch, asked):
    """At a time limit too."""
    monkeypatch.chdir(tmp_path)
    job = Job(tmp_path, exclude_stragglers=asked)
    job.run(event("straggler", '"hosts": ["node2"]') + CHECKPOINT % (3, 3))
    again = f"sbatch --parsable --exclude=node2 {tmp_path}/run/pretrain.sbatch of 7"
    assert job.read("calls") == ([again] if asked else ["requeue"])


def test_nodes_are_kept_if_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Job(tmp_path, exclude_after_failure=False)
    (tmp_path / "sinfo").write_text("node2 down*\n")
    job.run("exit 9")
    assert job.read("run/excluded_nodes") == [] and job.read("calls") == ["requeue"]


@pytest.mark.parametrize(
    ("beats", "hangs"),
    [
        ("echo >run/heartbeat; /bin/sleep 0.6; ", ""),
        (
            """echo '{"step": 3, "limit_seconds": 1, "phase": "step"}' >run/heartbeat; """,
            "no step for 1 s",
        ),
    ],
    ids=["within --hang-seconds", "beyond what the ranks expect"],
)
def test_a_run_that_hangs_is_ended(job, beats, hangs):
    """What an earlier start has expected of its steps says nothing of this one."""
    (job.folder / "run").mkdir()
    (job.folder / "run/heartbeat").write_text('{"limit_seconds": 0}')
    job.run("/bin/sleep 0.3; " + beats + ("exec /bin/sleep 10" if hangs else "exit 9"))
    assert (hangs in job.log) if hangs else "no step for" not in job.log, job.log
    assert (job.read("calls")[:1] == ["scancel --signal=KILL 7.1"]) is bool(hangs)
    assert ("status 137" in job.log) is (job.folder / "run/hung").exists() is bool(hangs)


def test_the_hook_hears_of_spikes_of_this_start(job):
    (job.folder / "run").mkdir()
    (job.folder / "run/events.jsonl").write_text('{"step": 1, "event": "spike"}\n')
    later = """echo '{"step": 2, "event": "spike"}' >>run/events.jsonl; echo '{"step": 3, "event": "step"}' >>run/events.jsonl; """
    job.run("/bin/sleep 0.3; " + later + "/bin/sleep 0.5; touch run/done")
    assert [line.split(" ", 1)[1] for line in job.read("hooks")] == [
        'spike: {"step": 2, "event": "spike"}',
        "done: the run is done",
    ]


def test_a_hook_that_fails_changes_nothing(job):
    (job.folder / "bin/hook").write_text("#!/bin/bash\nexit 3\n")
    assert job.run("touch run/done") == 0 and "the hook failed with status 3" in job.log


@pytest.mark.parametrize("beats", [100, 0], ids=["while they train", "of ranks that end before their second beat"])
def test_the_transport_that_nccl_took_is_in_the_log(job, beats):
    lines = "NCCL INFO Using network IB\\n" + "NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0\\n" * 2
    # They beat until the line is there, however seldom the script looks.
    beat = f"for ((i = 0; i < {beats}; i++)); do echo $i >run/heartbeat; [ ! -e {LOGS}/transport ] || break; /bin/sleep 0.1; done; "
    ends = f"[ ! -e {LOGS}/transport ] || touch while_they_train; touch run/done"
    job.run(f"printf '{lines}' >{LOGS}/nccl-node1-1.log; " + beat + ends)
    assert job.log.count("NCCL: via NET/IB/0 (2 times), Using network IB (1 times)\n") == 1
    assert (job.folder / "while_they_train").exists() is bool(beats)


def test_the_settings_of_nccl_are_the_owners_if_there_are_any(job):
    show = 'echo "$NCCL_DEBUG ${NCCL_DEBUG_FILE:-console}" >nccl; touch run/done'
    job.run(show, NCCL_DEBUG="WARN")
    assert job.read("nccl") == ["WARN console"]


def test_kernels_are_kept_on_the_node(job):
    job.run('echo "$TRITON_CACHE_DIR" >cache; touch run/done', SLURM_TMPDIR="/local/7")
    assert job.read("cache") == [f"/local/7/based-triton-{os.getuid()}"]


BAD = """case "$*" in
*"based_megatron nodes"*) while [ $# -gt 1 ]; do [ "$1" != --bad-nodes ] || echo node1 >$2; shift; done; echo bad node node1: slow;;
*) echo "$*" >calls_of_ranks; {};;
esac"""
"""Shell of ranks that name a bad node when they are asked, and else do something."""


def test_a_bad_node_is_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Job(tmp_path, check=True, spare_nodes=1)
    assert "#SBATCH --nodes=3" in (tmp_path / "script").read_text().splitlines()
    hostnames = 'case $1 in show) printf "node1\\nnode2\\nnode3\\n";; esac'
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/bash\n{hostnames}\n")
    assert job.run(BAD.format('echo "$MASTER_ADDR" >address; touch run/done'), SLURM_JOB_NUM_NODES="3") == 0
    assert "--nodes=2 --ntasks=2 --nodelist=node2,node3" in (tmp_path / "words").read_text()
    assert job.read("address") == ["node2"]
    assert [line.split()[:2] for line in job.read("run/excluded_nodes")] == [["node1", "slow"]]
    assert job.read("run/logs/7.0/nodes.log") == ["bad node node1: slow"]


def test_without_a_spare_the_run_goes_on_in_a_job_without_the_bad_node(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Job(tmp_path, check=True)
    assert job.run(BAD.format("touch run/done")) == 1
    assert job.read("calls") == [f"sbatch --parsable --exclude=node1 {tmp_path}/run/pretrain.sbatch of 7"]
    assert not job.read("calls_of_ranks")


@pytest.mark.parametrize("found", ["echo node1 >$2; echo node2 >>$2", ":"], ids=["all bad", "no answer"])
def test_a_check_that_says_nothing_of_single_nodes_stops_no_run(tmp_path, monkeypatch, found):
    monkeypatch.chdir(tmp_path)
    job = Job(tmp_path, check=True)
    assert job.run(BAD.replace("echo node1 >$2", found).format("touch run/done")) == 0
    assert not job.read("run/excluded_nodes") and not job.read("calls")


def test_a_sick_first_node_is_found_by_way_of_the_second(tmp_path, monkeypatch):
    """All others talk to the host that leads the check, which names no node if its own is sick."""
    monkeypatch.chdir(tmp_path)
    job = Job(tmp_path, check=True)
    second_only = BAD.replace("echo node1 >$2", '[ "$MASTER_ADDR" != node2 ] || echo node1 >$2')
    job.run('echo "$MASTER_ADDR $*" >>checks; ' + second_only.format("touch run/done"))
    first, second = job.read("checks")
    assert first.startswith("node1 ") and "--leader 0 " in first
    assert second.startswith("node2 ") and "--leader 1 " in second
    assert job.read("calls") == [f"sbatch --parsable --exclude=node1 {tmp_path}/run/pretrain.sbatch of 7"]
    assert "by way of node1 did not end: once more by way of node2" in job.log


def test_nodes_are_measured_only_if_asked(job):
    job.run('echo "$*" >>calls_of_ranks; touch run/done')
    assert len(job.read("calls_of_ranks")) == 1
