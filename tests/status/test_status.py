"""What `based status` makes of run folders, whose files are written here as a run writes them, and of real runs."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from based_megatron.errors import ConfigError
from based_megatron.monitor.events import append_event
from based_megatron.run_folder.failures import write_failure
from based_megatron.run_folder.history import Start, append_start
from based_megatron.run_folder.lock import this_process
from based_megatron.status.cli import main
from based_megatron.status.record import RunRecord
from based_megatron.status.run import RunStatus, host_of, status_of

NOW = 1_000_000.0
ALIVE, GONE = os.getpid(), 2**22 + 1
Write = Callable[..., None]


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of 100 steps before its first start."""
    (tmp_path / "config.yaml").write_text("train:\n  steps: 100\n")
    return tmp_path


@pytest.fixture
def write(run_dir) -> Write:
    """Writes an event: its name, the seconds before NOW, the step."""

    def write(name: str, ago: float, step: int, **fields: Any) -> None:
        append_event(run_dir / "events.jsonl", {"time": NOW - ago, "step": step, "event": name, **fields})

    return write


def beat(run_dir: Path, ago: float, **content: Any) -> None:
    (run_dir / "heartbeat").write_text(json.dumps(content) if content else "")
    os.utime(run_dir / "heartbeat", (NOW - ago, NOW - ago))


def lock(run_dir: Path, pid: int, ago: float = 1.0, **changes: Any) -> None:
    owner = {**asdict(this_process(stale_seconds=300)), "pid": pid, **changes}
    (run_dir / "lock").write_text(json.dumps(owner))
    os.utime(run_dir / "lock", (NOW - ago, NOW - ago))


def look(run_dir: Path) -> RunStatus:
    record = RunRecord(run_dir / "events.jsonl")
    record.update()
    return status_of(run_dir, record, NOW)


def spent(**seconds: float) -> dict[str, float]:
    return {f"wall_seconds/{name}": value for name, value in seconds.items()}


def running(write: Write, run_dir: Path) -> None:
    """A run that began 1000 s ago, took 60 s to its first step, and is at step 41 of 100."""
    write("start", 960, 0, process_seconds=40.0, world_size=4, hosts={"a": 2, "b": 2})
    write("step", 940, 1, loss=9.0)
    write("validation", 500, 20, loss=5.5)
    write("checkpoint", 400, 30, seconds=0.5, write_seconds=9.0)
    parts = spent(start_up=60.0, steps=800.0, data=20.0, skipped=20.0, validation=30.0, save=40.0, other=20.0)
    speed = {"tokens_per_second": 5e3, "mfu": 0.4, "step_seconds": 21.0, "eta_seconds": 1500.0}
    write("step", 10, 41, loss=4.0, loss_mean=4.5, tokens_seen=41_000, **speed, **parts)
    lock(run_dir, ALIVE)
    beat(run_dir, 5, step=42, phase="forward_backward", limit_seconds=120)


def test_a_run_that_runs(write, run_dir):
    running(write, run_dir)
    status = look(run_dir)
    assert (status.state, status.name, status.step, status.steps, status.tokens) == ("running", None, 41, 100, 41_000)
    assert (status.loss, status.validation_loss, status.validation_step) == (4.5, 5.5, 20)
    assert (status.tokens_per_second, status.mfu, status.ranks) == (5e3, 0.4, 4)
    assert status.eta_seconds == 1490.0, "10 s have passed since it was predicted"
    assert status.silent_seconds == 5.0
    assert status.last_save is not None
    assert (status.last_save.step, status.last_save.age_seconds, status.last_save.seconds) == (30, 400.0, 0.5)


def test_the_name_is_that_of_the_last_start(write, run_dir):
    running(write, run_dir)
    for i, name in enumerate(("first", "second"), start=1):
        append_start(run_dir, Start(i, "id", name, "", [], {}, {}, None, {}, ["a"], 1, None, 0))
    assert look(run_dir).name == "second"


def test_where_the_time_went_adds_up(write, run_dir):
    running(write, run_dir)
    status = look(run_dir)
    assert status.elapsed_seconds == pytest.approx(1000.0)
    assert status.goodput == pytest.approx(0.81), "800 s in steps, and 10 s since the last word"
    assert status.seconds["save"] == 40.0 and status.seconds["start_up"] == 60.0 and status.seconds["down"] == 0.0


def test_a_restart_and_what_it_lost(write, run_dir):
    """41 steps in 1000 s, a crash, 200 s of nothing, and a new process that goes on from step 31."""
    write("start", 1960, 0, process_seconds=40.0)
    write("step", 1000, 41, loss=4.0, **spent(start_up=60.0, steps=800.0, data=140.0))
    write("error", 1000, 41, rank=2, host="node-2", type="RuntimeError", message="CUDA error:\nlaunch failed")
    write("resume", 750, 31, process_seconds=50.0)
    write("step", 100, 51, loss=3.0, **spent(start_up=80.0, steps=600.0))
    lock(run_dir, ALIVE)
    beat(run_dir, 1, limit_seconds=120)
    status = look(run_dir)
    (restart,) = status.restarts
    assert (restart.step, restart.lost_steps, restart.time) == (31, 10, NOW - 800)
    assert restart.cause == "rank 2 on node-2: RuntimeError: CUDA error: launch failed"
    assert status.seconds["down"] == 200.0 and status.seconds["start_up"] == 140.0
    assert status.seconds["lost"] == pytest.approx(10 * 800 / 40)
    assert status.seconds["steps"] == pytest.approx(800 - 200 + 600 + 100)
    assert sum(status.seconds.values()) == pytest.approx(2000.0) == status.elapsed_seconds


def test_a_step_that_was_only_written_before_a_save_counts(write, run_dir):
    running(write, run_dir)
    write("steps", 2, 45, loss=[4.0] * 4, grad_norm=[1.0] * 4)
    assert look(run_dir).step == 45


@pytest.mark.parametrize("word", ["stop", "end", "error"])
def test_the_last_word_is_the_state(write, run_dir, word):
    write("start", 900, 0)
    write("step", 100, 100, loss=4.0)
    write(word, 10, 100, reason="SIGTERM", type="ValueError", message="no")
    assert look(run_dir).state == {"stop": "stopped", "end": "done", "error": "crashed"}[word]


def test_a_finished_run_that_was_given_more_steps_is_not_done(write, run_dir):
    write("start", 900, 0)
    write("step", 100, 50, loss=4.0)
    write("end", 10, 50)
    (run_dir / "done").touch()
    assert look(run_dir).state != "done"


@pytest.mark.parametrize(("age", "state"), [(119.0, "running"), (121.0, "hung")])
def test_a_run_that_lives_but_does_not_move_is_hung(write, run_dir, age, state):
    running(write, run_dir)
    beat(run_dir, age, limit_seconds=120)
    status = look(run_dir)
    assert status.state == state and (status.eta_seconds is None) == (state == "hung")


def test_a_hang_names_who_waits_for_whom(write, run_dir):
    running(write, run_dir)
    beat(run_dir, 500, limit_seconds=120)
    write("hang", 300, 42, message="rank 2 on b is in data at step 42; 3 ranks wait", behind=[2])
    status = look(run_dir)
    assert status.state == "hung" and status.reason.startswith("rank 2 on b") and status.hang is not None
    assert status.hang["behind"] == [2]


def test_a_process_that_is_gone_has_crashed(write, run_dir):
    running(write, run_dir)
    lock(run_dir, GONE)
    status = look(run_dir)
    assert status.state == "crashed" and "without a last word" in status.reason


def test_the_cause_is_known_although_the_logging_rank_was_killed(write, run_dir):
    write("start", NOW - 1.0, 0, world_size=3, hosts={"a": 2, "b": 1})
    for rank in (1, 2):
        write_failure(run_dir / "errors", rank, RuntimeError("Connection closed by peer"))
    lock(run_dir, GONE)
    status = look(run_dir)
    assert status.state == "crashed" and status.reason.startswith("rank 0 on a: Killed: ended without a word")


@pytest.mark.parametrize(("age", "state"), [(59.0, "running"), (61.0, "crashed")])
def test_a_lock_of_another_host_is_judged_by_its_age(write, run_dir, age, state):
    running(write, run_dir)
    lock(run_dir, ALIVE, ago=age, host="elsewhere", processes="another machine", stale_seconds=60)
    assert look(run_dir).state == state


def test_a_start_before_its_first_word(run_dir):
    assert look(run_dir).state == "waiting"
    lock(run_dir, ALIVE)
    assert look(run_dir).state == "starting"
    lock(run_dir, GONE)
    assert look(run_dir).state == "crashed"


def test_a_start_after_a_crash_is_starting(write, run_dir):
    write("start", 900, 0)
    write("error", 500, 3, type="ValueError", message="no")
    lock(run_dir, ALIVE)
    status = look(run_dir)
    assert status.state == "starting" and "ValueError: no" in status.reason


def test_the_slowest_rank_and_stragglers_have_hosts(write, run_dir):
    running(write, run_dir)
    write("straggler", 1500, 5, rank=1, host="a", slower=0.9)
    slow = {"slowest_rank": 3, "own_seconds_slowest": 3.0, "own_seconds_median": 2.0}
    write("step", 5, 42, loss=4.0, **slow)
    write("straggler", 5, 42, rank=3, host="b", slower=0.25)
    write("straggler", 4, 43, rank=3, host="b", slower=0.5)
    status = look(run_dir)
    assert status.slowest is not None and (status.slowest.rank, status.slowest.host) == (3, "b")
    assert [(s.rank, s.host, s.slower, s.step) for s in status.stragglers] == [(3, "b", 0.5, 43)], "those of this start"


@pytest.mark.parametrize(("rank", "host"), [(0, "a"), (1, "a"), (2, "b"), (4, "b"), (5, None)])
def test_ranks_are_numbered_host_by_host(rank, host):
    assert host_of(rank, {"a": 2, "b": 3}) == host


def test_a_run_of_an_older_version(write, run_dir):
    """No sums of times, no content in the heartbeat, no lock."""
    write("start", 1000, 0, world_size=1)
    write("step", 900, 1, loss=9.0, skipped=False)
    write("step", 100, 41, loss=4.0, step_seconds=15.0, goodput=0.75, tokens_per_second=10.0)
    beat(run_dir, 50)
    status = look(run_dir)
    assert (status.state, status.loss, status.step) == ("running", 4.0, 41)
    assert status.eta_seconds == pytest.approx(59 * 15.0 / 0.75)
    assert status.seconds["steps"] == pytest.approx(41 * 15.0 + 100.0)
    beat(run_dir, 1801)
    assert look(run_dir).state == "hung"


def test_a_long_file_is_read_on_from_where_it_was(write, run_dir):
    running(write, run_dir)
    path = run_dir / "events.jsonl"
    record = RunRecord(path)
    record.update()
    content = path.read_bytes()
    write("skip", 3, 42)
    line = path.read_bytes()[len(content) :]
    path.write_bytes(content + line[:30])
    record.update()
    assert "skip" not in record.counts, "half a line is none yet"
    path.write_bytes(content + line)
    record.update()
    record.update()
    assert record.counts["skip"] == 1 and len(record.processes) == 1
    path.write_bytes(line)
    record.update()
    assert record.counts == {"skip": 1}, "a shorter file is another one"


def test_lines_that_are_cut_or_strange_cost_only_themselves(write, run_dir):
    running(write, run_dir)
    with open(run_dir / "events.jsonl", "ab") as file:
        file.write(
            b'{"time": 1, "step": 9, "event": "skip"\n\xff\xfe\n[1]\n{"event": "skip"}\n{"event": "step", "step": "x"}\n'
        )
    write("skip", 3, 42)
    assert look(run_dir).skips == 1


def test_the_json_is_strict(write, run_dir, capsys):
    running(write, run_dir)
    write("step", 1, 43, loss=math.nan, eta_seconds=math.inf)
    assert main([str(run_dir), str(run_dir), "--json"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    values = json.loads(first, parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))
    assert values["loss"] == "nan" and values["step"] == 43 and json.loads(second)["run"] == str(run_dir)


def test_a_page_of_one_run_and_a_table_of_several(write, run_dir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    running(write, run_dir)
    append_start(run_dir, Start(1, "id", "mine", "", [], {}, {}, None, {}, ["a"], 1, None, 0))
    main([str(run_dir)])
    shown = capsys.readouterr().out
    assert "41 of 100 (41.0%), 41k tokens" in shown and "4.5000 in training, 5.5000 in validation at step 20" in shown
    assert max(map(len, shown.splitlines())) <= 80
    main([str(run_dir), str(run_dir)])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and max(map(len, shown)) <= 80 and "41/100" in shown[1]


def test_among_several_a_folder_that_is_no_run_is_left_out(write, run_dir, tmp_path, capsys):
    running(write, run_dir)
    (tmp_path / "other").mkdir()
    main([str(run_dir), str(tmp_path / "other"), "--json"])
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1 and "other is no run folder and is left out" in shown.err


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no run folder"):
        main([str(tmp_path)])


def test_no_heavy_library_is_loaded(write, run_dir):
    running(write, run_dir)
    code = (
        "import sys; from based_megatron.cli import main; main(sys.argv[1:]);"
        "sys.exit(str({'torch', 'numpy', 'megatron', 'deepspeed'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, "status", str(run_dir)], capture_output=True, text=True)
    assert done.stderr.strip() == "set()", done.stderr
