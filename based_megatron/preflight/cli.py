"""The command `based preflight`: what a run will need and take, without a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from based_megatron.config import Config, parse_config
from based_megatron.errors import ConfigError
from based_megatron.launchers.slurm import SlurmOptions, render_sbatch
from based_megatron.preflight.checks import data_refusals, disk_refusals, kept_bytes, layout_refusals
from based_megatron.preflight.gpus import gpu_named
from based_megatron.preflight.layouts import fits, propose
from based_megatron.preflight.memory import worst_rank
from based_megatron.preflight.report import memory_lines, proposal_lines, refusal_lines, time_lines
from based_megatron.preflight.time import run_time


@dataclass(frozen=True)
class PreflightOptions:
    """Predict memory, time and disk of a run, and say all that a start would refuse. Any field of the config can follow, as in train."""

    config: tyro.conf.Positional[str]
    """A preset by name, or a YAML file."""
    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 8
    """GPUs of each node, one rank each."""
    gpu: str = "h100"
    """Kind of GPU."""
    read_shards: bool = True
    """Read every byte of the prepared data and compare it with its hash."""
    sbatch: bool = True
    """Print the batch script of `based launch slurm` if the run can start."""


def main(argv: Sequence[str]) -> int:
    """Print the page. Returns 0 if the run can start and fits, else 1. Raises ConfigError for options that mean nothing."""
    options, overrides = tyro.cli(PreflightOptions, prog="based preflight", args=list(argv), return_unknown_args=True)
    for key, value in {"--nodes": options.nodes, "--gpus-per-node": options.gpus_per_node}.items():
        if value < 1:
            raise ConfigError(f"{key} is {value} but must be at least 1")
    train = ["--config", options.config, *overrides]
    config = parse_config(train, prog="based preflight")
    runs = preflight(options, config, ["train", *train])
    return 0 if runs else 1


def preflight(options: PreflightOptions, config: Config, command: Sequence[str]) -> bool:
    """Print what there is to say; returns whether `command` can start on these nodes."""
    nodes, gpus, gpu = options.nodes, options.gpus_per_node, gpu_named(options.gpu)
    ranks = nodes * gpus
    refusals, lines, has_room = layout_refusals(config, ranks), [], False
    if not refusals:
        memory, time = worst_rank(config, ranks), run_time(config, nodes, gpus, gpu)
        has_room = fits(memory, gpu)
        lines = memory_lines(memory, gpu) + time_lines(time, ranks, kept_bytes(config, time.save_bytes))
        refusals += disk_refusals(config, time.save_bytes)
    refusals += data_refusals(config, options.read_shards)
    lines = refusal_lines(refusals) + lines
    if not has_room:
        lines += proposal_lines(propose(config, nodes, gpus, gpu))
    print("\n".join(lines))
    runs = has_room and not refusals
    if runs and options.sbatch:
        print(render_sbatch(SlurmOptions(nodes=nodes, gpus_per_node=gpus), command, config), end="")
    return runs
