"""Output folders are there whole or not at all, whatever ends the process that writes them."""

import signal
import subprocess
import sys

import pytest

from based_megatron.convert.folder import new_folder
from based_megatron.errors import CheckpointError

WRITER = """
import sys, time
from pathlib import Path
from based_megatron.convert.folder import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "old").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing tmp_path/out."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def write(output):
    with new_folder(output) as folder:
        (folder / "new").write_text("whole")


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_can_be_caught_leaves_nothing(writer, tmp_path, number):
    writer.send_signal(number)
    assert writer.wait(timeout=20) in (128 + number, -number)
    assert names(tmp_path) == []


def test_what_a_killed_writer_leaves_is_visible_and_replaced_by_the_next(writer, tmp_path):
    writer.kill()
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    write(tmp_path / "out")
    assert names(tmp_path) == ["out", "out/new"]


def test_two_writers_of_one_output_are_not_mixed(writer, tmp_path):
    with pytest.raises(CheckpointError, match=r"out\.partial is being written by another process"):
        write(tmp_path / "out")
    assert (tmp_path / "out.partial" / "out" / "old").read_text() == "half"


def test_signals_are_as_they_were_afterwards(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    write(tmp_path / "out")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("")
        raise ZeroDivisionError
    assert names(tmp_path) == []
