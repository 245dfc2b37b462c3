"""The engines that `--executor` names, and the SLURM job that `based prep` itself runs in."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import xxhash

from based_megatron.data_prep.config import PrepConfig
from based_megatron.data_prep.output import resolved_output
from based_megatron.data_prep.tasks import Engine, Tasks, usable_cores
from based_megatron.data_prep.unit_store import JOBS
from based_megatron.errors import ConfigError


def engine_of(config: PrepConfig, folder: Path) -> Engine:
    """The engine of a start, with the folder of its finished work. Raises ConfigError if it is not installed."""
    if config.executor == "local":
        return Tasks(config.tasks)
    from based_megatron.data_prep import datatrove_tasks as datatrove

    execute: datatrove.Execute
    if config.executor == "slurm":
        resources = datatrove.SlurmResources(
            config.slurm_time, config.slurm_partition, config.slurm_memory_gb, config.slurm_options
        )
        execute = datatrove.submit_to_slurm(_job_name(config), resources)
    else:
        execute = datatrove.run_on_ray if config.executor == "ray" else datatrove.run_here
    return datatrove.DatatroveTasks(config.tasks or usable_cores(), folder / JOBS, execute)


def is_to_be_submitted(config: PrepConfig) -> bool:
    """Whether this process is to submit the work as a SLURM job, and not to do it."""
    return config.executor == "slurm" and "SLURM_JOB_ID" not in os.environ


def submit(config: PrepConfig, argv: Sequence[str]) -> str:
    """Submit the command as a job that submits the tasks, waits for them and ends with them. Returns its number.

    The job may be requeued: it goes on. Raises ConfigError if SLURM refuses it.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("there is no sbatch here; submit from a login node, or use another --executor")
    output = resolved_output(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    options = [
        f"--job-name={_job_name(config)}-main",
        f"--output={output}.slurm-%j.log",
        "--open-mode=append",
        "--requeue",
        "--ntasks=1",
        f"--mem={config.slurm_memory_gb}G",
        f"--time={config.slurm_time}",
        *([f"--partition={config.slurm_partition}"] if config.slurm_partition else []),
        *(f"--{option}" for option in config.slurm_options),
    ]
    command = shlex.join([sys.executable, "-m", "based_megatron", "prep", *argv])
    words = ["sbatch", "--parsable", *options, f"--wrap=exec {command}"]
    found = subprocess.run(words, capture_output=True, text=True)
    if found.returncode:
        raise ConfigError(f"sbatch refuses the job: {' '.join(found.stderr.split())}")
    return found.stdout.strip().split(";")[0]


def _job_name(config: PrepConfig) -> str:
    """The name of the jobs of one output."""
    output = str(resolved_output(config.output))
    return f"prep-{Path(output).name}-{xxhash.xxh3_64_hexdigest(os.fsencode(output))[:8]}"
