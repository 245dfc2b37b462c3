"""The one command: dispatch, help, exit codes, and errors in one line."""

import importlib
import os
import subprocess
import sys

import pytest

from based_megatron import __version__, cli, process
from based_megatron.errors import BasedError, CheckpointError, ConfigError, DataError, TrainingError


@pytest.fixture
def command(monkeypatch):
    """Replaces `based train` by a function."""

    def replace(function) -> None:
        monkeypatch.setattr(cli, "_function", lambda name: function)

    return replace


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(capsys, flag):
    assert cli.main([flag]) == 0
    shown = capsys.readouterr().out
    for name, (summary, _) in cli.COMMANDS.items():
        assert name in shown and summary in shown


def test_no_command_shows_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: based COMMAND" in capsys.readouterr().out


def test_an_unknown_command_fails_and_shows_the_commands(capsys):
    assert cli.main(["trian", "--config", "tiny"]) == 2
    captured = capsys.readouterr()
    assert "unknown command 'trian'" in captured.err and "train" in captured.err and not captured.out


def test_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists(name):
    module, _, function = cli.COMMANDS[name][1].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("error", [BasedError, ConfigError, DataError, CheckpointError, TrainingError])
def test_a_users_error_is_one_line(command, capsys, monkeypatch, error):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)

    def fails(argv: list[str]) -> None:
        raise error("the value\n  is 3;\tset it to 4")

    command(fails)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "based: error: the value is 3; set it to 4\n"


@pytest.mark.parametrize(
    ("variable", "rank", "where"),
    [("RANK", "0", "based: "), ("RANK", "3", "based rank 3: "), ("SLURM_PROCID", "2", "based rank 2: ")],
)
def test_an_error_names_its_rank(command, capsys, monkeypatch, variable, rank, where):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, rank)
    monkeypatch.setattr(process, "FIRST_WORD_SECONDS", 0.0)

    def fails(argv: list[str]) -> None:
        raise ConfigError("no")

    command(fails)
    cli.main(["train"])
    assert capsys.readouterr().err == f"{where}error: no\n"


def test_a_file_that_cannot_be_used_is_one_line(command, capsys, tmp_path):
    command(lambda argv: len((tmp_path / ("x" * 300)).read_text()))
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == f"based: error: File name too long: {tmp_path}/{'x' * 300}\n"


def test_an_interruption_is_one_line(command, capsys):
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    command(interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "based: interrupted\n"


@pytest.mark.parametrize("flag", [["--help"], ["status", "--help"]], ids=" ".join)
def test_a_reader_that_has_seen_enough_gets_no_traceback(flag):
    """A pipe that nobody reads any more."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([sys.executable, "-m", "based_megatron", *flag], stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert done.returncode == 1 and done.stderr == b""


def test_a_name_that_is_no_text_can_be_printed(tmp_path):
    run_dir = tmp_path / os.fsdecode(b"run\xff")
    run_dir.mkdir()
    (run_dir / "config.yaml").touch()
    done = subprocess.run([sys.executable, "-m", "based_megatron", "status", str(run_dir)], capture_output=True)
    assert done.returncode == 0 and done.stderr == b"" and b"run\\udcff" in done.stdout


def test_a_bug_keeps_its_traceback(command):
    def fails(argv: list[str]) -> None:
        raise KeyError("a bug")

    command(fails)
    with pytest.raises(KeyError):
        cli.main(["train"])


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_exit_code_is_the_commands(command, returned, code):
    command(lambda argv: returned)
    assert cli.main(["train"]) == code


def test_arguments_reach_the_command(command):
    seen: list[list[str]] = []
    command(seen.append)
    cli.main(["train", "--config", "tiny", "--", "x"])
    assert seen == [["--config", "tiny", "--", "x"]]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["typo"],
        *([name, "--help"] for name in cli.COMMANDS),
        ["launch", "slurm", "--help"],
        ["train", "--config", "nowhere"],
        ["train", "--config", "tiny", "--optimizer.lr", "nan"],
        ["train", "--config", "tiny", "--optimizer.lrr", "1"],
        ["train", "--config", "tiny", "--print-config"],
        ["launch", "slurm", "--nodes", "0", "--", "train", "--config", "tiny"],
    ],
    ids=" ".join,
)
def test_help_and_refusals_do_not_wait_for_heavy_libraries(arguments):
    """They take seconds to load. All that a settings file or a command line gets wrong shows before."""
    code = (
        "import sys\nfrom based_megatron.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'deepspeed', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True).returncode == 0
