"""Stop signals during the start, before the seconds that imports take."""

import os
import signal
import subprocess
import sys

import pytest

from based_megatron.config import command_line
from based_megatron.errors import ConfigError
from based_megatron.train import cli, train
from based_megatron.train.signals import STOP_SIGNALS, StopSignals


@pytest.fixture(autouse=True)
def kept_handlers():
    kept = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_while_the_command_line_is_read_reaches_the_run(monkeypatch, tmp_path, number):
    parse = command_line.parse_command

    def slow_parse(argv):
        os.kill(os.getpid(), number)
        return parse(argv)

    found = []
    monkeypatch.setattr(command_line, "parse_command", slow_parse)
    monkeypatch.setattr(train, "train", lambda config, signals: found.append(signals.received))
    cli.main(["--config", "tiny", "--run-dir", str(tmp_path)])
    assert found == [number.name]


@pytest.mark.parametrize(
    ("rank", "asked", "ends"), [("1", True, SystemExit), ("1", False, ConfigError), ("0", True, ConfigError)]
)
def test_a_refused_rank_that_is_being_ended_says_nothing(monkeypatch, capsys, rank, asked, ends):
    """Rank 0 was refused before it, and its launcher ends the others."""

    def refuse(argv):
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        raise ConfigError("no")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(command_line, "parse_command", refuse)
    with pytest.raises(ends) as error:
        cli.main(["--config", "tiny"])
    assert capsys.readouterr().err == "" and getattr(error.value, "code", 2) == 2


def test_no_signal_is_no_reason_to_stop():
    assert StopSignals().received == ""


def test_nothing_slow_is_imported_before_signals_are_noted():
    look = (
        "import sys, based_megatron.cli, based_megatron.train.cli; print({'torch', 'yaml', 'tyro'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
