"""The one command: `based SUBCOMMAND ...`."""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper

from based_megatron import __version__
from based_megatron.errors import BasedError
from based_megatron.process import end_with_torchrun, leave_cause, let_rank_0_speak, rank_name

REFUSED = BasedError.exit_code
# Each entry: what it does, and module:function taking the remaining arguments. Imported only when used: torch takes seconds.
COMMANDS = {
    "prep": ("tokenize text, JSON lines, parquet or source files into shards", "based_megatron.data_prep.cli:main"),
    "train": ("pretrain; every rank runs this", "based_megatron.train.cli:main"),
    "status": ("say how runs are, while they run and after, from their files", "based_megatron.status.cli:main"),
    "preflight": ("predict memory, time and disk of a run, without a GPU", "based_megatron.preflight.cli:main"),
    "nodes": ("measure the nodes of a job, and name those that are slow or wrong", "based_megatron.nodes.cli:main"),
    "launch": ("start the ranks of a command, here or on SLURM", "based_megatron.launchers.cli:main"),
    "generate": ("continue a prompt with a trained model", "based_megatron.inference.cli:main"),
    "serve": ("serve a model over HTTP, as OpenAI's clients ask for it", "based_megatron.serving.cli:main"),
    "eval": ("score a model on lm-eval's tasks and on generated recall tasks", "based_megatron.evaluation.cli:main"),
    "export": ("write a checkpoint in Hugging Face format, and prove it", "based_megatron.convert.cli:main_export"),
    "verify-export": ("compare the files of an export with their hashes", "based_megatron.convert.cli:main_verify"),
    "import": ("read a released or exported model into a checkpoint", "based_megatron.convert.cli:main_import"),
    "ckpt": ("list, inspect and verify checkpoints", "based_megatron.checkpoint.cli:main"),
    "data": ("list the documents of a training step, verify shards", "based_megatron.data.cli:main"),
    "recall": ("measure how well mixers recall, over the size of their states", "based_megatron.recall.cli:main"),
    "bench": ("check kernels and time them against baselines", "based_megatron.bench.cli:main"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code. A user's error is one line on stderr and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has seen enough. Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("based: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"based: unknown command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    end_with_torchrun()
    _quiet_progress_bars()
    try:
        return int(_function(argv[0])(argv[1:]) or 0)
    except BasedError as error:
        leave_cause(error)
        if error.exit_code == REFUSED:
            let_rank_0_speak(error.exit_code)
        _print_error(error)
        return error.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        leave_cause(error)
        if isinstance(error, OSError) and error.filename:
            _print_error(f"{error.strerror}: {error.filename}")
            return 1
        raise


def _quiet_progress_bars() -> None:
    """Keep the progress bars of other libraries out of log files, unless the environment asks for them."""
    if not sys.stderr.isatty():
        for variable in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(variable, "1")


def usage() -> str:
    """The text that `based --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (summary, _) in COMMANDS.items()]
    return "usage: based COMMAND ...\n\ncommands (each has --help):\n" + "\n".join(lines)


def _function(command: str) -> Callable[[list[str]], int | None]:
    module, _, name = COMMANDS[command][1].partition(":")
    return getattr(importlib.import_module(module), name)


def _print_error(error: BasedError | str) -> None:
    rank = rank_name()
    where = f" rank {rank}" if rank not in ("", "0") else ""
    print(f"based{where}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
