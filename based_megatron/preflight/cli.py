"""The command `based preflight`: what a run will need and take, without a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from based_megatron.config import parse_config
from based_megatron.errors import ConfigError


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
    from based_megatron.preflight.run import preflight

    runs = preflight(options, config, ["train", *train])
    return 0 if runs else 1
