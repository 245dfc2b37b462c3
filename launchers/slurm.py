"""A run as a SLURM job that survives time limits, preemption, lost nodes and hangs, and gives up without progress."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from based_megatron.config import Config, parse_config
from based_megatron.config.limits import absolute_paths
from based_megatron.config.validate import check_run_dir
from based_megatron.errors import ConfigError
from based_megatron.launchers.script import SlurmOptions, job_name, ranks_of, render_sbatch, run_folder
from based_megatron.launchers.sweep import sweep_commands
from based_megatron.run_folder.files import DONE, EXCLUDED_NODES, FAILURES, SBATCH

FULL_TOKENS = 2048
"""Tokens of a micro batch on one rank below which a step takes no less: the host launches kernels all the time."""


@dataclass(frozen=True)
class _Run:
    """A run that can start, and its batch script."""

    config: Config
    script: str


def launch_slurm(options: SlurmOptions, command: Sequence[str]) -> int:
    """Write the script to the run folder and submit it, or print it; with a sweep once for each run. Returns the exit code.

    Raises BasedError if a run cannot start with so many ranks, before any is submitted, or if SLURM refuses a job.
    """
    if command[0] != "train":
        raise ConfigError(f"`launch slurm` starts training runs, not {command[0]!r}; use -- train --config ...")
    runs = [_accepted(options, words) for words in sweep_commands(command, options.sweep)]
    if options.dry_run:
        print("".join(run.script for run in runs), end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError("there is no sbatch here; submit from a login node, or look at the script with --dry-run")
    for run in runs:
        _submit(options, run)
    return 0


def _accepted(options: SlurmOptions, command: Sequence[str]) -> _Run:
    """Raises BasedError for what the ranks would refuse: better now than after hours in the queue."""
    config = absolute_paths(parse_config(command[1:]))
    script = render_sbatch(options, command, config)
    if not options.after:
        from based_megatron.train.accept import accept

        accept(config, ranks_of(options))
    tokens = config.train.micro_batch_sequences * config.data.sequence_length_tokens // config.parallel.context
    if options.gpus_per_node and tokens < FULL_TOKENS:
        print(
            f"based: note: {tokens:,} tokens a rank and micro batch do not fill a GPU (from {FULL_TOKENS:,} on they do): lower "
            f"parallel.context {config.parallel.context}, or raise train.micro_batch_sequences",
            file=sys.stderr,
        )
    return _Run(config, script)


def _submit(options: SlurmOptions, run: _Run) -> None:
    run_dir, stop_file = run_folder(run.config), run.config.train.stop_file
    check_run_dir(run_dir, needed_bytes=0)
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / SBATCH
    path.write_text(run.script)
    arguments = [*_first_submission(options, run_dir), str(path)]
    _sbatch("--test-only", *arguments)
    # Whoever submits a finished run again has given it more steps; one that gave up may fail as often again.
    for name in (DONE, FAILURES):
        (run_dir / name).unlink(missing_ok=True)
    if not _queued(job_name(run_dir)):
        # Otherwise it is for the job before, which has not ended yet.
        (run_dir / stop_file).unlink(missing_ok=True)
    job = _sbatch("--parsable", *arguments).strip().split(";")[0]
    print(f"job {job}, log {run_dir}/slurm-{job}.log, ranks in {run_dir}/logs")
    print(f"to stop the run: touch {shlex.quote(str(run_dir / stop_file))} (saves first), or scancel {job}")


def _first_submission(options: SlurmOptions, run_dir: Path) -> list[str]:
    """Options of sbatch that are not those of all later jobs of the run, and so not in the script."""
    words = []
    if options.after:
        jobs = ":".join(options.after.split(","))
        words += [f"--dependency=singleton,afterok:{jobs}", "--kill-on-invalid-dep=yes"]
    excluded_file = run_dir / EXCLUDED_NODES
    if excluded_file.is_file():
        failed = [line.split()[0] for line in excluded_file.read_text().splitlines() if line.strip()]
        print(
            f"without {', '.join(failed)}: they failed before; delete their lines in {excluded_file} to use them again"
        )
        words.append(f"--exclude={','.join([*filter(None, [options.exclude]), *failed])}")
    return words


def _queued(name: str) -> bool:
    """Whether a job of this name waits or runs."""
    if shutil.which("squeue") is None:
        return False
    result = subprocess.run(["squeue", "--noheader", "--me", f"--name={name}"], capture_output=True, text=True)
    return bool(result.stdout.strip())


def _sbatch(*arguments: str) -> str:
    """Output of sbatch. Raises ConfigError with its message if it fails."""
    result = subprocess.run(["sbatch", *arguments], capture_output=True, text=True)
    if result.returncode:
        raise ConfigError(f"sbatch refuses the job: {' '.join(result.stderr.split())}")
    return result.stdout
