"""The batch script of a run: the options that go into it, and its text."""

import hashlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

import tyro

from based_megatron.config import Config
from based_megatron.config.limits import check_limits, flag
from based_megatron.config.schema import Count
from based_megatron.config.validate import validate
from based_megatron.errors import ConfigError
from based_megatron.run_folder.files import SBATCH

OWN_OPTIONS = {
    "array": "its elements would all train in one run folder; --sweep gives each its own",
    "dependency": "use --after",
    "job-name": "the name keeps a second job out of the run folder",
    "exclude": "use --exclude",
    "nodes": "use --nodes",
    "ntasks": "use --tasks-per-node",
    "ntasks-per-node": "use --tasks-per-node",
    "cpus-per-task": "use --cpus-per-task",
    "gpus": "use --gpus-per-node",
    "gpus-per-node": "use --gpus-per-node",
    "gpus-per-task": "a rank must see all GPUs of its node; use --gpus-per-node",
    "time": "use --time",
    "signal": "use --stop-seconds",
    "requeue": "the script starts itself again",
    "no-requeue": "the script could not start itself again; --max-failures 1 gives up at the first failure",
    "output": "the log belongs into the run folder",
    "error": "the log belongs into the run folder",
    "open-mode": "the log is one file for all restarts",
}
"""Options of sbatch that the script sets, and so --sbatch may not: each with what to do instead, or why."""
SHORT_OPTIONS = {"a": "array", "d": "dependency", "J": "job-name", "x": "exclude", "N": "nodes", "n": "ntasks"} | {
    "c": "cpus-per-task", "G": "gpus", "t": "time", "o": "output", "e": "error",
}  # fmt: skip


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
    """Start again if no step ends for so many seconds: more than start-up, compilation, a validation and a checkpoint take.
    Once steps are measured, the run itself may say less."""
    max_failures: Count = 3
    """Give up after this number of failures in a row without a newer checkpoint."""
    successor: bool = True
    """Keep a job waiting that goes on if the batch script itself is killed. It is cancelled when the script ends in any other way."""
    exclude_after_failure: bool = True
    """Start again without the nodes that were lost, or that kept the others waiting in a hang (file excluded_nodes)."""
    exclude_stragglers: bool = False
    """Start again without the nodes whose ranks were reported as slow."""
    check: bool = False
    """Measure the nodes first (`based nodes`), and train without those that are slow or wrong."""
    spare_nodes: int = 0
    """Nodes to ask for beyond --nodes, so that --check can leave bad ones out at once. Those left over are idle."""
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
    srun: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """One more option of srun, as one word such as --srun=--mpi=none; repeat the flag for others."""
    cpu_bind: str = ""
    """Binding of ranks to cores, as srun has it: cores, sockets, or a list with verbose."""
    container: str = ""
    """Image that the ranks run in, pyxis:IMAGE or apptainer:IMAGE. The folders of the run and its data are mounted."""
    wrap: str = ""
    """Words in front of the command of a rank, such as `numactl --localalloc`. What they start must become the rank, or signals
    would not reach it."""
    python: str = ""
    """Python of the ranks; by default this one, in a container its python3."""
    interface: str = ""
    """Network interface for NCCL and Gloo, such as ib0, where they choose a wrong one."""
    setup: str = ""
    """Shell commands to run first, such as `module load cuda`. Your environment is passed on anyway."""
    after: str = ""
    """Ids of jobs that must succeed first, with commas between, such as that of `based prep`. The data is then not checked now."""
    hook: str = ""
    """Command to call as COMMAND EVENT TEXT at a stop, crash, spike, or when the run is done; BASED_RUN_DIR is in its environment."""
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A setting and its values, such as optimizer.lr=1e-3,8e-4; repeat the flag for others. Each combination is a job of its own, in
    a folder of the run folder."""
    dry_run: bool = False
    """Check everything, print the script and do nothing."""


class _Template(Template):
    """A template whose placeholders begin with @, because the shell uses $."""

    delimiter = "@"


def run_folder(config: Config) -> Path:
    """The run folder by its one name: a link to it must not look like another run."""
    return Path(config.run_dir).resolve()


def job_name(run_dir: Path) -> str:
    """Name of every job of a run folder, and of no other, so that `singleton` keeps a second job out of it."""
    digest = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]
    name = run_dir.name if run_dir.name.startswith("based") else f"based-{run_dir.name}"
    return f"{name}-{digest}"


def ranks_of(options: SlurmOptions) -> int:
    """Number of ranks of the job."""
    return options.nodes * (options.tasks_per_node or options.gpus_per_node)


def render_sbatch(options: SlurmOptions, command: Sequence[str], config: Config) -> str:
    """Text of the batch script. `config` is what the train command resolves to."""
    check_limits(options, flag)
    _check_options(options, config)
    _check_layout(options, config)
    run_dir = run_folder(config)
    template = resources.files("based_megatron.launchers").joinpath(SBATCH).read_text()
    interfaces = " ".join(
        f"{name}={shlex.quote(options.interface)}" for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    )
    return _Template(template).substitute(
        directives="\n".join(f"#SBATCH {line}" for line in _directives(options, run_dir)),
        setup=options.setup or ":",
        check="check_nodes" if options.check else ":",
        check_command=shlex.join(_rank_command(options, ["nodes"], config)),
        nodes=options.nodes,
        ranks=ranks_of(options),
        interface=f"export {interfaces}" if options.interface else ":",
        working_dir=shlex.quote(os.getcwd()),
        run_dir=shlex.quote(str(run_dir)),
        stop_file=shlex.quote(config.train.stop_file),
        hang_seconds=options.hang_seconds,
        max_failures=options.max_failures,
        exclude=shlex.quote(options.exclude),
        exclude_after_failure="yes" if options.exclude_after_failure else "",
        exclude_stragglers="yes" if options.exclude_stragglers else "",
        hook=shlex.quote(options.hook),
        successor="yes" if options.successor else "",
        srun_options=shlex.join(_srun_options(options, config)),
        command=shlex.join(_rank_command(options, command, config)),
    )


def _check_options(options: SlurmOptions, config: Config) -> None:
    if not ranks_of(options):
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
    if options.spare_nodes and not options.check:
        raise ConfigError(
            f"--spare-nodes {options.spare_nodes} would be idle: without --check no node is left out; set --check"
        )
    if not config.checkpoint.resume:
        raise ConfigError(
            "checkpoint.resume is off, and a job that is started again would begin at step 0 each time; leave out "
            "--checkpoint.no-resume, and choose another run_dir for a new run"
        )
    for word in options.sbatch:
        _check_sbatch(word)
    _container(options)


def _check_sbatch(word: str) -> None:
    """Raise ConfigError for an option of sbatch that the script sets itself. Long ones may be abbreviated."""
    given = word.partition("=")[0]
    if given.startswith("--"):
        names = [name for name in OWN_OPTIONS if name.startswith(given[2:])]
    else:
        names = [SHORT_OPTIONS[letter] for letter in given[1:2] if letter in SHORT_OPTIONS]
    if not word.startswith("-") or not given.strip("-"):
        raise ConfigError(
            f"--sbatch {word!r} is no option of sbatch; write it as one word, such as --sbatch=--constraint=h100"
        )
    if names:
        raise ConfigError(f"--sbatch={word} cannot be given: {OWN_OPTIONS[names[0]]}")


def _check_layout(options: SlurmOptions, config: Config) -> None:
    nodes = f"--nodes {options.nodes} --gpus-per-node {options.gpus_per_node}"
    try:
        validate(config, ranks_of(options))
        # Mixers take seconds to load: what is wrong with the options shows before.
        from based_megatron.model.check import check_mixers

        check_mixers(config)
    except ConfigError as error:
        proposal = f" (`based preflight CONFIG {nodes}` proposes layouts that fit)" if options.gpus_per_node else ""
        raise ConfigError(f"{error}{proposal}") from error


def _directives(options: SlurmOptions, run_dir: Path) -> list[str]:
    """Lines that SLURM reads."""
    lines = [
        f"--job-name={shlex.quote(job_name(run_dir))}",
        "--dependency=singleton",
        f"--nodes={options.nodes + options.spare_nodes}",
        f"--ntasks-per-node={ranks_of(options) // options.nodes}",
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


def _srun_options(options: SlurmOptions, config: Config) -> list[str]:
    kind, image = _container(options)
    words = [f"--cpu-bind={options.cpu_bind}"] if options.cpu_bind else []
    if kind == "pyxis":
        mounts = ",".join(f"{folder}:{folder}" for folder in _mounts(config))
        words += [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={os.getcwd()}"]
    return [*words, *options.srun]


def _rank_command(options: SlurmOptions, command: Sequence[str], config: Config) -> list[str]:
    """What srun starts: Python itself, or something that becomes it, because SLURM signals only what srun has started."""
    kind, image = _container(options)
    words = shlex.split(options.wrap)
    if kind == "apptainer":
        gpus = ["--nv"] if options.gpus_per_node else []
        words += ["apptainer", "exec", *gpus, "--bind", ",".join(_mounts(config)), "--pwd", os.getcwd(), image]
    python = options.python or ("python3" if kind else sys.executable)
    return [*words, python, "-m", "based_megatron", *command]


def _container(options: SlurmOptions) -> tuple[str, str]:
    """(kind, image) of --container; two empty strings without one."""
    kind, _, image = options.container.partition(":")
    if options.container and not (kind in ("pyxis", "apptainer") and image):
        raise ConfigError(f"--container is {options.container!r}; write it as pyxis:IMAGE or apptainer:IMAGE")
    return kind, image


def _mounts(config: Config) -> list[str]:
    """Folders that the ranks read and write, each once."""
    data = [config.data.path, *(source.path for source in config.data.sources), config.checkpoint.load]
    folders = [run_folder(config), Path.cwd(), *(Path(path).resolve() for path in data if path)]
    return list(dict.fromkeys(map(str, folders)))


def _seconds(time: str) -> int:
    """Seconds of a time limit of sbatch: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ConfigError for anything else."""
    days, dash, rest = time.rpartition("-")
    fields = rest.split(":")
    if len(fields) > 3 or not all(field.isdecimal() for field in [*fields, *([days] if dash else [])]):
        raise ConfigError(f"--time {time!r} is not a time limit; write it as D-HH:MM:SS, HH:MM:SS or minutes")
    units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(int(field) * unit for field, unit in zip(fields, units, strict=False))
