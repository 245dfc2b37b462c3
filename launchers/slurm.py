"""A run as a SLURM job that survives time limits, preemption, lost nodes and hangs, and gives up without progress."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

import tyro

from based_megatron.config import Config, parse_config
from based_megatron.config.limits import check_limits, flag
from based_megatron.config.schema import Count
from based_megatron.config.validate import check_run_dir, validate
from based_megatron.errors import ConfigError

SCRIPT_NAME = "pretrain.sbatch"


@dataclass(frozen=True)
class SlurmOptions:
    """Start the ranks as a SLURM job. The script and the log go to the run folder, which all nodes must see."""

    nodes: Count
    """Number of nodes."""
    gpus_per_node: int = 8
    """GPUs of each node, and ranks unless tasks_per_node says otherwise; 0 for a CPU cluster."""
    tasks_per_node: int = 0
    """Ranks on each node; 0 means one for each GPU."""
    cpus_per_task: Count = 8
    """CPU cores of each rank."""
    time: str = "24:00:00"
    """Time limit of one job, in a form that sbatch takes. The run goes on in the next."""
    stop_seconds: Count = 600
    """Seconds before the time limit at which the run is asked to save: more than a step, a validation and a checkpoint take."""
    hang_seconds: Count = 1800
    """Start again if no step ends for so many seconds: more than start-up, compilation, a validation and a checkpoint take."""
    max_failures: Count = 3
    """Give up after this number of failures in a row without a newer checkpoint."""
    partition: str = ""
    """Partition to use, if not the cluster's default."""
    account: str = ""
    """Account to charge."""
    qos: str = ""
    """Quality of service."""
    exclude: str = ""
    """Nodes not to use, as a SLURM host list."""
    exclusive: bool = True
    """Take whole nodes, with all of their memory."""
    sbatch: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """One more option of sbatch, as one word such as --sbatch=--constraint=h100; repeat the flag for others."""
    setup: str = ""
    """Shell commands to run first, such as `module load cuda`. Your environment is passed on anyway."""
    dry_run: bool = False
    """Print the script and do nothing."""


class _Template(Template):
    """A template whose placeholders begin with @, because the shell uses $."""

    delimiter = "@"


def launch_slurm(options: SlurmOptions, command: Sequence[str]) -> int:
    """Write the script to the run folder and submit it, or print it; returns the exit code.

    Raises ConfigError if the config cannot run with so many ranks, or if SLURM refuses the job.
    """
    if command[0] != "train":
        raise ConfigError(f"`launch slurm` starts training runs, not {command[0]!r}; use -- train --config ...")
    config = parse_config(command[1:])
    script = render_sbatch(options, command, config)
    if options.dry_run:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError("there is no sbatch here; submit from a login node, or look at the script with --dry-run")
    run_dir = Path(config.run_dir).absolute()
    check_run_dir(run_dir, needed_bytes=0)
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / SCRIPT_NAME
    path.write_text(script)
    _sbatch("--test-only", str(path))
    # Whoever submits a finished run again has given it more steps.
    (run_dir / "done").unlink(missing_ok=True)
    job = _sbatch("--parsable", str(path)).strip().split(";")[0]
    print(f"job {job}, log {run_dir}/slurm-{job}.log")
    print(
        f"to stop the run: touch {shlex.quote(str(run_dir / config.train.stop_file))} (saves first), or scancel {job}"
    )
    return 0


def render_sbatch(options: SlurmOptions, command: Sequence[str], config: Config) -> str:
    """Text of the batch script. `config` is what the train command resolves to."""
    tasks_per_node = options.tasks_per_node or options.gpus_per_node
    check_limits(options, flag)
    if not tasks_per_node:
        raise ConfigError("--gpus-per-node and --tasks-per-node are 0, but a node needs a rank; set --tasks-per-node")
    if options.hang_seconds <= config.parallel.timeout_seconds:
        raise ConfigError(
            f"--hang-seconds {options.hang_seconds} must be above parallel.timeout_seconds "
            f"{config.parallel.timeout_seconds}: a collective that times out names its cause; raise --hang-seconds"
        )
    if options.stop_seconds >= _seconds(options.time):
        raise ConfigError(
            f"--stop-seconds {options.stop_seconds} is not below the limit --time {options.time}: the run would stop "
            f"at once; change either"
        )
    validate(config, options.nodes * tasks_per_node)
    # Mixers take seconds to load: what is wrong with the options shows before.
    from based_megatron.model.check import check_mixers

    check_mixers(config)
    run_dir = Path(config.run_dir).absolute()
    template = resources.files("based_megatron.launchers").joinpath(SCRIPT_NAME).read_text()
    return _Template(template).substitute(
        directives="\n".join(f"#SBATCH {line}" for line in _directives(options, tasks_per_node, run_dir)),
        setup=options.setup or ":",
        working_dir=shlex.quote(os.getcwd()),
        run_dir=shlex.quote(str(run_dir)),
        stop_file=shlex.quote(config.train.stop_file),
        hang_seconds=options.hang_seconds,
        max_failures=options.max_failures,
        command=shlex.join([sys.executable, "-m", "based_megatron", *command]),
    )


def _directives(options: SlurmOptions, tasks_per_node: int, run_dir: Path) -> list[str]:
    """Lines that SLURM reads. The job's name belongs to one run folder, so that `singleton` keeps a second job out of it."""
    digest = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]
    name = run_dir.name if run_dir.name.startswith("based") else f"based-{run_dir.name}"
    lines = [
        f"--job-name={shlex.quote(f'{name}-{digest}')}",
        "--dependency=singleton",
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={options.cpus_per_task}",
        f"--time={options.time}",
        f"--signal=B:USR1@{options.stop_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={shlex.quote(f'{run_dir}/slurm-%j.log')}",
    ]
    if options.gpus_per_node:
        # Not --gpus-per-task: a rank picks its GPU by its local rank, so it must see all of the node's.
        lines.append(f"--gpus-per-node={options.gpus_per_node}")
    if options.exclusive:
        lines += ["--exclusive", "--mem=0"]
    for name in ("partition", "account", "qos", "exclude"):
        if value := getattr(options, name):
            lines.append(f"--{name}={shlex.quote(value)}")
    return [*lines, *options.sbatch]


def _seconds(time: str) -> int:
    """Seconds of a time limit of sbatch: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ConfigError for anything else."""
    days, dash, rest = time.rpartition("-")
    fields = rest.split(":")
    if len(fields) > 3 or not all(field.isdecimal() for field in [*fields, *([days] if dash else [])]):
        raise ConfigError(f"--time {time!r} is not a time limit; write it as D-HH:MM:SS, HH:MM:SS or minutes")
    units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(int(field) * unit for field, unit in zip(fields, units, strict=False))


def _sbatch(*arguments: str) -> str:
    """Output of sbatch. Raises ConfigError with its message if it fails."""
    result = subprocess.run(["sbatch", *arguments], capture_output=True, text=True)
    if result.returncode:
        raise ConfigError(f"sbatch refuses the job: {' '.join(result.stderr.split())}")
    return result.stdout
