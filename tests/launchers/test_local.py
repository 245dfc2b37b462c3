"""Ranks on this machine, with a stub in the place of training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from based_megatron import process
from based_megatron.errors import ConfigError
from based_megatron.launchers.cli import main

STUB = """
import importlib.util, os, pathlib, signal, sys, time
# The stub is in the place of the package, whose process.py every rank runs first.
spec = importlib.util.spec_from_file_location("process", os.environ["PROCESS_FILE"])
process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(process)
process.end_with_torchrun()
folder, status = pathlib.Path(sys.argv[1]), int(sys.argv[2])
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
rank = os.environ["RANK"]
found = " ".join(os.environ[name] for name in ("WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS"))
(folder / f"rank{rank}").write_text(found)
started = [folder / f"rank{other}" for other in (0, 1)]
while not all(file.exists() and file.stat().st_size for file in started):  # a rank that fails ends the other
    time.sleep(0.01)
while status < 0:
    time.sleep(0.05)
    if stopped:
        (folder / f"saved{rank}").touch()
        sys.exit(0)
sys.exit(status)
"""


@pytest.fixture
def start(tmp_path):
    """A function that launches two ranks of a stub, which ends with a status, or, if that is below 0, when asked to."""
    stub = tmp_path / "elsewhere" / "based_megatron"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    (stub / "__main__.py").write_text(STUB)
    program = "import sys; from based_megatron.launchers.cli import main; sys.exit(main(sys.argv[1:]))"

    def run(status: int) -> subprocess.Popen:
        # With -P the launcher does not look into the working folder; the ranks, run with -m, find the stub there.
        line = [sys.executable, "-P", "-c", program, "local", "--nproc", "2", "--", str(tmp_path), str(status)]
        environment = os.environ | {"OMP_NUM_THREADS": "3", "PROCESS_FILE": process.__file__}
        return subprocess.Popen(line, cwd=stub.parent, env=environment, stderr=subprocess.DEVNULL)

    return run


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"no {files}"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("status, expected", [(0, 0), (3, 1)], ids=["success", "failure"])
def test_the_exit_code_says_whether_a_rank_failed(start, tmp_path, status, expected):
    """torchrun exits 1 for any failed rank."""
    assert start(status).wait(60) == expected
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["2 127.0.0.1 3"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2], ids=lambda number: number.name)
def test_a_stop_signal_lets_every_rank_save(start, tmp_path, number):
    launcher = start(-1)
    wait_for(tmp_path / "rank0", tmp_path / "rank1")
    launcher.send_signal(number)
    assert launcher.wait(60) == 0
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["launcher", "agent"])
def test_ranks_end_with_what_started_them(start, tmp_path, killed):
    """Else they would go on training and saving, next to those of the next start."""
    launcher = start(-1)
    wait_for(tmp_path / "rank0", tmp_path / "rank1")
    (agent,) = psutil.Process(launcher.pid).children()
    ranks = agent.children()
    assert len(ranks) == 2
    (launcher if killed == "launcher" else agent).kill()
    assert launcher.wait(60) != 0
    assert not psutil.wait_procs([agent, *ranks], timeout=20)[1]
    assert not list(tmp_path.glob("saved*"))


def test_a_dry_run_prints_the_command(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert main(["local", "--nproc", "4", "--dry-run", "--", "train", "--config", "a b.yaml"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("OMP_NUM_THREADS=5 ")
    assert shown.endswith("--nproc-per-node=4 -m based_megatron train --config 'a b.yaml'\n")


def test_cores_are_shared_by_the_ranks(capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(9)))
    main(["local", "--nproc", "4", "--dry-run", "--", "train"])
    assert capsys.readouterr().out.startswith("OMP_NUM_THREADS=2 ")


@pytest.mark.parametrize(
    "arguments", [["--nproc", "0", "--", "train"], ["--nproc", "2"], ["--nproc", "2", "--"]], ids=str
)
def test_impossible_options_are_refused(arguments):
    with pytest.raises(ConfigError):
        main(["local", *arguments])
